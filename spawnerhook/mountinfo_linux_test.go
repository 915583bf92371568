package spawnerhook_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tokenbroker/spawnerhook"
)

func mounts(t *testing.T, text string) []spawnerhook.Mount {
	t.Helper()
	m, err := spawnerhook.ParseMountinfo([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func readTestdata(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The captured containers mount /srv/broker/r1, on a host where / and /run are
// one file system.
var (
	capturedDir    = spawnerhook.NewPlace("254:0", "/srv/broker/r1")
	capturedSocket = spawnerhook.NewPlace("254:0", "/run/docker.sock")
)

func TestCapturedMountsShowWhatAContainerHas(t *testing.T) {
	for _, tt := range []struct{ file, want string }{
		{"e2010-mountinfo-default.txt", ""},
		// Docker 20.10 makes only the top of it read-only.
		{"e2010-mountinfo-bind-cgroup-ro.txt", "cgroups (mounted at /cg/cpu)"},
		{"e2010-mountinfo-bind-run-ro.txt", "Docker socket (in what is mounted at /hostrun)"},
		{"e2010-mountinfo-bind-dockersock.txt", "Docker socket (in what is mounted at /d.sock)"},
	} {
		t.Run(tt.file, func(t *testing.T) {
			m := mounts(t, readTestdata(t, tt.file))
			var found []string
			for _, f := range spawnerhook.Found(m, spawnerhook.NewPlace("254:0", "/"), []spawnerhook.Place{capturedSocket}) {
				found = append(found, f.Says)
			}
			if all := strings.Join(found, "; "); !strings.Contains(all, tt.want) || (tt.want == "") != (all == "") {
				t.Errorf("found %q, want %q", all, tt.want)
			}
			if fault := spawnerhook.DirectoryFault(m, capturedDir); fault != "" {
				t.Errorf("DirectoryFault: got %q, want none", fault)
			}
		})
	}
}

func TestTheDirectoryMustBeMountedItselfAndReadOnly(t *testing.T) {
	const root = "1 0 0:61 / / rw - overlay overlay rw\n"
	for _, tt := range []struct{ why, mounts, want string }{
		{"as it must be", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw", ""},
		{"not at all", root, "does not mount"},
		{"somewhere else", root + "2 1 254:0 /srv/broker/r1 /run/other ro - ext4 x rw", "does not mount"},
		{"another server's", root + "2 1 254:0 /srv/broker/r2 /run/tokenbroker ro - ext4 x rw", "another one"},
		{"the same path of another file system", root + "2 1 254:1 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw", "another one"},
		{"one that was removed since", root + "2 1 254:0 /srv/broker/r1//deleted /run/tokenbroker ro - ext4 x rw", "another one"},
		{"writable", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker rw - ext4 x rw", "writable"},
		{"read-only file system, writable mount", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker rw - ext4 x ro", "writable"},
		{"hidden below another", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n3 2 0:9 / /run/tokenbroker rw - tmpfs x rw", "another one"},
		{"on top of another", root + "3 2 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n2 1 0:9 / /run/tokenbroker rw - tmpfs x rw", ""},
		{"and its parent, writable", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n3 1 254:0 /srv /mnt rw - ext4 x rw", "at /mnt"},
		{"and its parent, read-only", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n3 1 254:0 /srv /mnt ro - ext4 x rw", ""},
		{"and one whose name begins alike, writable", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n3 1 254:0 /srv/broker/r /mnt rw - ext4 x rw", ""},
		{"and the whole disk, writable", root + "2 1 254:0 /srv/broker/r1 /run/tokenbroker ro - ext4 x rw\n3 1 254:0 / /mnt rw - ext4 x rw", "at /mnt"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := spawnerhook.DirectoryFault(mounts(t, strings.TrimSuffix(tt.mounts, "\n")+"\n"), capturedDir)
			if !strings.Contains(got, tt.want) || (tt.want == "") != (got == "") {
				t.Errorf("DirectoryFault: got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestMountinfoNamesAreUnescaped(t *testing.T) {
	m := mounts(t, `36 35 98:0 /a\040b /c\134d\011 rw,noatime master:1 - ext3 /dev/root rw`+"\n")
	got, ok := spawnerhook.MountAt(m, "/c\\d\t")
	if !ok || got.Place() != spawnerhook.NewPlace("98:0", "/a b") {
		t.Errorf("MountAt: got %+v, %v", got, ok)
	}
}

func TestMountinfoThatTheKernelWouldNotWriteIsAnError(t *testing.T) {
	for _, text := range []string{"", "\n", "36 35 98:0 / / rw - ext3\n", "36 35 98:0 / / - ext3 x rw\n", "x 35 98:0 / / rw - ext3 x rw\n", "36 x 98:0 / / rw - ext3 x rw\n", "36 35 98:0 / / rw - ext3 x rw"} {
		if m, err := spawnerhook.ParseMountinfo([]byte(text)); err == nil {
			t.Errorf("ParseMountinfo(%q): got %v, want an error", text, m)
		}
	}
}

func TestADirectoryIsLocatedThroughSymlinks(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real"), filepath.Join(dir, "link")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	want, err := spawnerhook.Locate(real)
	if err != nil {
		t.Fatal(err)
	}
	got, err := spawnerhook.Locate(link)
	if err != nil || got != want {
		t.Errorf("Locate(link): got %v, %v, want %v", got, err, want)
	}
	if got, err := spawnerhook.Locate(filepath.Join(dir, "none")); err == nil {
		t.Errorf("Locate of nothing: got %v, want an error", got)
	}
}

func TestADirectoryIsTheSameThroughABindMount(t *testing.T) {
	dir := t.TempDir()
	real, bound := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := errors.Join(os.MkdirAll(filepath.Join(real, "x y"), 0o755), os.Mkdir(bound, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(real, bound, "", unix.MS_BIND, ""); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("mount: %v", err)
		}
		t.Skipf("only root may mount: %v", err)
	}
	defer unix.Unmount(bound, unix.MNT_DETACH)
	want, err := spawnerhook.Locate(filepath.Join(real, "x y"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := spawnerhook.Locate(filepath.Join(bound, "x y"))
	if err != nil || got != want {
		t.Errorf("Locate: got %v, %v, want %v", got, err, want)
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add([]byte("36 35 98:0 /a\\040b /c rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"))
	f.Add([]byte("1 1 0:4 net:[4026532185] /x rw - nsfs nsfs rw\n2 1 0:4 / /run/tokenbroker ro - tmpfs \\ rw\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := spawnerhook.ParseMountinfo(b)
		if err != nil {
			return
		}
		if fault := spawnerhook.DirectoryFault(m, capturedDir); fault != "" {
			return
		}
		got, ok := spawnerhook.MountAt(m, spawnerhook.MountPoint)
		if !ok || got.Place() != capturedDir {
			t.Fatalf("no fault is found in %q", b)
		}
	})
}

func FuzzStart(f *testing.F) {
	f.Add([]byte("1 (a) b) S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 777 1 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) { spawnerhook.ParseStart(b) })
}

func TestTheStartTimeIsReadBehindTheNameThatAProcessChooses(t *testing.T) {
	for _, tt := range []struct {
		stat string
		want uint64
	}{
		{"7 (x) S 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 4242 0\n", 4242},
		{"7 (x) S 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0) S 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 4242 0\n", 4242},
		{"7 (x) Z 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 4242 0\n", 0},
		{"7 (x", 0},
	} {
		if got, err := spawnerhook.ParseStart([]byte(tt.stat)); got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("ParseStart(%q): got %d, %v, want %d", tt.stat, got, err, tt.want)
		}
	}
}
