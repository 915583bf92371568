package spawnerhook_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/spawnerhook"
)

const (
	victim20 = "8594838a3076583321cf0452258132291b9a13afe6d3aa9a21f077fdfa0dc38f"
	victim29 = "9581f423a785f1e2750de12258ad021a894de45024df9e21c22583a95205c8bf"
)

// cgroups reads a captured /proc/PID/cgroup; the names are those of the capture:
// engine, kind, shape.
func cgroups(t *testing.T, name string) []spawnerhook.CgroupLine {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name + ".txt")
	if err != nil {
		t.Fatal(err)
	}
	lines, err := spawnerhook.ParseCgroups(b)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestACallerIsInTheContainerOnlyIfEveryRecordedPathIsEqual(t *testing.T) {
	for _, tt := range []struct {
		why, container, id, peer string
		same                     bool
	}{
		{"the container's own", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-init-victim", true},
		{"a sibling", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-peer-default", false},
		{"a sibling started below the victim, --cgroup-parent=/docker/<victim>", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-peer-cgparent-nested", false},
		{"a sibling that made a cgroup named like the victim and entered it", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-peer-mv-seccompunconf-deeper", false},
		{"cgroup v2: the container's own", "e29v2-cgroup-init-victim", victim29, "e29v2-cgroup-init-victim", true},
		{"cgroup v2: started below the victim", "e29v2-cgroup-init-victim", victim29, "e29v2-cgroup-peer-cgparent-in-other", false},
		{"cgroup v2: a cgroup named like the victim", "e29v2-cgroup-init-victim", victim29, "e29v2-cgroup-peer-mv-seccompunconf", false},
		{"SYS_ADMIN mounted two hierarchies of ten and moved in these", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-peer-mv-sysadmin-mount", false},
		// What cgroups can't tell; the namespaces do.
		{"container root moved through a writable mount", "e2010-cgroup-init-victim", victim20, "e2010-cgroup-peer-mv-bind-nocaps", true},
		{"cgroup v2: container root moved through a writable mount", "e29v2-cgroup-init-victim", victim29, "e29v2-cgroup-peer-mv-bind", true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			recorded := spawnerhook.OwnCgroups(cgroups(t, tt.container), tt.id)
			if len(recorded) == 0 {
				t.Fatal("nothing was recorded")
			}
			err := spawnerhook.SameCgroups(cgroups(t, tt.peer), recorded)
			if (err == nil) != tt.same {
				t.Errorf("SameCgroups: got %v, want same: %v", err, tt.same)
			}
		})
	}
}

func TestOnlyLinesThatEndInTheFullIDAreRecorded(t *testing.T) {
	id := strings.Repeat("ab", 32)
	for _, tt := range []struct {
		why, file string
		want      map[string]string
	}{
		{"cgroupfs driver", "1:cpu:/docker/" + id + "\n0::/docker/" + id + "\n", map[string]string{"cpu": "/docker/" + id, "": "/docker/" + id}},
		{"systemd driver", "0::/system.slice/docker-" + id + ".scope\n", map[string]string{"": "/system.slice/docker-" + id + ".scope"}},
		{"systemd driver, v1 and hybrid", "2:pids:/system.slice/docker-" + id + ".scope\n1:name=systemd:/system.slice/docker-" + id + ".scope\n0::/system.slice/docker-" + id + ".scope\n",
			map[string]string{"pids": "/system.slice/docker-" + id + ".scope", "name=systemd": "/system.slice/docker-" + id + ".scope", "": "/system.slice/docker-" + id + ".scope"}},
		{"v1 without a line of version 2", "2:pids:/docker/" + id + "\n1:cpu,cpuacct:/docker/" + id + "\n", map[string]string{"pids": "/docker/" + id, "cpu,cpuacct": "/docker/" + id}},
		{"hybrid, version 2 not used", "2:pids:/docker/" + id + "\n0::/\n", map[string]string{"pids": "/docker/" + id}},
		{"systemd driver, a scope of another", "0::/system.slice/docker-" + victim20 + ".scope\n", map[string]string{}},
		{"cgroup v2 on a hybrid host", "4:memory:/svc/dockerd\n1:cpu:/\n0::/docker/" + id + "\n", map[string]string{"": "/docker/" + id}},
		{"a dying process", "2:pids:/\n1:cpu:/\n0::/\n", map[string]string{}},
		{"the ID inside the path", "0::/docker/" + id + "/init\n", map[string]string{}},
		{"another ID below it", "0::/docker/" + id + "/" + victim20 + "\n", map[string]string{}},
		{"a removed cgroup", "0::/docker/" + id + " (deleted)\n", map[string]string{}},
		{"the beginning of the ID", "0::/docker/" + id[:63] + "\n", map[string]string{}},
		{"more than the ID", "0::/docker/x" + id + "\n", map[string]string{}},
		{"seen from a cgroup namespace", "0::/../" + id + "\n", map[string]string{"": "/../" + id}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			lines, err := spawnerhook.ParseCgroups([]byte(tt.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, spawnerhook.OwnCgroups(lines, id)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPathsMayDifferPerHierarchy(t *testing.T) {
	const id = "d03f14eceb2300167321bf94848ed3f5a1d4e7c36131514472c63fa973590ee3"
	own := spawnerhook.OwnCgroups(cgroups(t, "e2010-cgroup-init-cgroupparent-rel"), id)
	if own["memory"] != "/svc/dockerd/y/z/"+id || own["pids"] != "/y/z/"+id || len(own) != 10 {
		t.Errorf("OwnCgroups with a relative --cgroup-parent: got %v", own)
	}
}

func TestNothingRecordedMatchesNobody(t *testing.T) {
	lines := cgroups(t, "e2010-cgroup-init-victim")
	if err := spawnerhook.SameCgroups(lines, nil); err == nil {
		t.Error("SameCgroups with nothing recorded: got nil, want an error")
	}
	if err := spawnerhook.SameCgroups(lines, map[string]string{"net_cls": "/docker/" + victim20}); err == nil {
		t.Error("SameCgroups with a hierarchy that the caller has not: got nil, want an error")
	}
}

func TestWhatTheKernelWouldNotWriteIsAnError(t *testing.T) {
	for _, file := range []string{
		"", "\n", "0::", "0::/docker", "0::\n", "0:/x\n", "0::x\n", "0::/a\n\n",
		"0::/a\n0::/b\n", "1:cpu:/a\n2:cpu:/b\n", "0::/a\n1:cpu:/b",
	} {
		if lines, err := spawnerhook.ParseCgroups([]byte(file)); err == nil {
			t.Errorf("ParseCgroups(%q): got %v, want an error", file, lines)
		}
	}
}

func FuzzCgroups(f *testing.F) {
	for _, seed := range []string{"0::/\n", "3:cpu,cpuacct:/docker/" + victim20 + "\n0::/a:b\n", "1:name=systemd:/x (deleted)\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		lines, err := spawnerhook.ParseCgroups(b)
		if err != nil {
			return
		}
		// Nothing may be lost between the file and the decision: the container
		// always matches itself, and each recorded path is a whole line's end.
		own := spawnerhook.OwnCgroups(lines, victim20)
		for hierarchy, path := range own {
			if !strings.Contains(string(b), ":"+hierarchy+":"+path+"\n") || !strings.Contains(path, victim20) {
				t.Fatalf("recorded %q: %q from %q", hierarchy, path, b)
			}
		}
		if len(own) > 0 {
			if err := spawnerhook.SameCgroups(lines, own); err != nil {
				t.Fatalf("a container is not itself: %v", err)
			}
		}
	})
}
