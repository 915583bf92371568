package spawnerhook_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker/brokertest"
	"tokenbroker/spawnerhook"
)

// hostMounts is what the host's first process sees in the lab.
const hostMounts = "1 0 0:77 / / rw - ext4 /dev/vda rw\n2 1 0:4 / /proc rw - proc proc rw\n3 1 0:5 / /sys rw - sysfs sysfs rw\n4 1 0:6 / /run rw - tmpfs tmpfs rw\n"

// onHost gives the lab's host mounts of its own, and alice's directory a place
// beside another server's.
func onHost(t *testing.T, posture spawnerhook.Posture) *lab {
	t.Helper()
	servers := t.TempDir()
	l := newLab(t, func(c *spawnerhook.DockerConfig) {
		c.Posture, c.Private = posture, []string{servers, filepath.Join(servers, "none")}
		if err := os.MkdirAll(filepath.Join(c.ProcRoot, "1"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(c.ProcRoot, "1/mountinfo"), []byte(hostMounts), 0o644); err != nil {
			t.Fatal(err)
		}
	})
	l.dir = filepath.Join(servers, "alice")
	for _, name := range []string{"alice", "bob"} {
		if err := os.Mkdir(filepath.Join(servers, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func TestEachFindingIsFound(t *testing.T) {
	plain := readTestdata(t, "e2010-inspect-default.json")
	with := func(old, new string) string {
		if !strings.Contains(plain, old) {
			t.Fatalf("the captured answer has no %s", old)
		}
		return strings.Replace(plain, old, new, 1)
	}
	capability := func(names string) string { return with(`"CapAdd": null`, `"CapAdd": [`+names+`]`) }
	const runtime = `"Runtime": "runc"`
	for _, tt := range []struct {
		why, inspect, mounts string
		want                 string // names, - for none
	}{
		{"plain, 20.10", plain, "", "-"},
		{"plain, v29", readTestdata(t, "e29-inspect-default.json"), "", "-"},
		{"20.10 privileged", readTestdata(t, "e2010-inspect-notstarted-privileged.json"), "", "privileged"},
		{"v29 privileged", readTestdata(t, "e29-inspect-privileged.json"), "", "privileged"},
		{"SYS_ADMIN", readTestdata(t, "e2010-inspect-capadd-sysadmin.json"), "", "sys_admin sys_ptrace"},
		{"as typed", capability(`"sys_admin"`), "", "sys_admin"},
		{"all", capability(`"ALL"`), "", "all_capabilities"},
		{"each dangerous one", capability(`"CAP_SYS_PTRACE", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_DAC_READ_SEARCH", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"`), "",
			"sys_ptrace sys_module sys_rawio dac_read_search bpf checkpoint_restore"},
		{"another, and some that Docker gives", capability(`"CAP_NET_ADMIN", "CAP_CHOWN", "CAP_MKNOD"`), "", "other_capabilities"},
		{"host PIDs", readTestdata(t, "e2010-inspect-pid-host.json"), "", "pid_host"},
		{"another container's PIDs", readTestdata(t, "e2010-inspect-pid-container.json"), "", "pid_container"},
		{"host network", with(`"NetworkMode": "none"`, `"NetworkMode": "host"`), "", "network_host"},
		{"host network and the /sys that comes with it", with(`"NetworkMode": "none"`, `"NetworkMode": "host"`), "20 1 0:5 / /sys ro - sysfs sysfs ro\n", "network_host"},
		{"another container's network", with(`"NetworkMode": "none"`, `"NetworkMode": "container:x"`), "", "network_container"},
		{"host IPC", readTestdata(t, "e2010-inspect-ipc-host.json"), "", "ipc_host"},
		{"another container's IPC", with(`"IpcMode": "private"`, `"IpcMode": "container:x"`), "", "ipc_container"},
		{"host users", readTestdata(t, "e2010-inspect-userns-host.json"), "", "userns_host"},
		{"host cgroups on v2", readTestdata(t, "e29v2-inspect-cgroupns-host.json"), "", "cgroupns_host"},
		{"no seccomp", readTestdata(t, "e2010-inspect-seccomp-unconfined.json"), "", "seccomp_unconfined"},
		{"no seccomp, with a colon", with(`"SecurityOpt": null`, `"SecurityOpt": ["seccomp:unconfined"]`), "", "seccomp_unconfined"},
		{"no AppArmor", readTestdata(t, "e2010-inspect-apparmor-unconfined.json"), "", "apparmor_unconfined"},
		{"no closed paths", readTestdata(t, "e2010-inspect-systempaths-unconfined.json"), "", "system_paths"},
		{"writable cgroups, v1", plain, "20 1 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu\n", "writable_cgroups"},
		{"writable cgroups, v2", plain, "20 1 0:29 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "writable_cgroups"},
		{"a device", readTestdata(t, "e2010-inspect-device.json"), "", "devices"},
		{"a disk", with(`"Devices": []`, `"Devices": [{"PathOnHost": "/dev/sda1"}]`), "", "raw_devices devices"},
		{"all devices", with(`"Devices": []`, `"Devices": [{"PathOnHost": "/dev/"}]`), "", "raw_devices devices"},
		{"a rule for one kind", with(`"DeviceCgroupRules": null`, `"DeviceCgroupRules": ["c 195:* rmw"]`), "", "device_cgroup_rules"},
		{"a rule for all", readTestdata(t, "e2010-inspect-devcgrouprule.json"), "", "raw_devices device_cgroup_rules"},
		{"Docker's socket", plain, "docker.sock", "docker_socket"},
		{"the host's files", plain, "20 1 0:77 / /host ro - ext4 /dev/vda rw\n", "host_root"},
		{"the host's /proc", plain, "20 1 0:4 / /host/proc ro - proc proc rw\n", "host_proc"},
		{"a part of it", plain, "20 1 0:4 /sys/kernel /p rw - proc proc rw\n", "host_proc"},
		{"the files of the host's graphics driver", plain, "20 1 0:4 /driver/nvidia/gpus/0 /proc/driver/nvidia/gpus/0 ro - proc proc rw\n", "-"},
		{"its own /proc", plain, "20 1 0:64 / /proc rw - proc proc rw\n", "-"},
		{"the /proc that comes with the host's PIDs", readTestdata(t, "e2010-inspect-pid-host.json"), "20 1 0:4 / /proc rw - proc proc rw\n", "pid_host"},
		{"the host's /sys", plain, "20 1 0:5 / /host/sys ro - sysfs sysfs rw\n", "host_sys"},
		{"the host's /run", plain, "20 1 0:6 / /mnt ro - tmpfs tmpfs rw\n", "host_run"},
		{"a directory below /run", plain, "20 1 0:6 /user/1000 /mnt rw - tmpfs tmpfs rw\n", "-"},
		{"another server's directory", plain, "bob", "broker_directories"},
		{"that of all servers", plain, ".", "broker_directories"},
		{"its own twice", plain, "alice", "-"},
		{"another runtime", with(runtime, `"Runtime": "nvidia"`), "", "runtime"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := onHost(t, everything(spawnerhook.Report))
			p := l.running(t, []byte(tt.inspect))
			if strings.Contains(tt.inspect, `"CgroupnsMode": "host"`) && tt.want == "cgroupns_host" {
				l.write(t, p.pid, "cgroup", readTestdata(t, "e29v2-cgroup-init-cgroupns-host.txt"))
			}
			l.write(t, p.pid, "mountinfo", l.mountinfo(t, "ro")+l.besides(t, tt.mounts))
			got := strings.Join(l.bound(t).Posture, " ")
			if got == "" {
				got = "-"
			}
			if got != tt.want {
				t.Errorf("found %s, want %s", got, tt.want)
			}
			covered(tt.want)
		})
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(spawnerhook.FindingNames())), slices.Sorted(maps.Keys(seen))); diff != "" {
		t.Errorf("rows without a test: %s", diff)
	}
}

var seen = map[string]bool{}

func covered(names string) {
	for _, n := range strings.Fields(names) {
		if n != "-" {
			seen[n] = true
		}
	}
}

// besides is a line of mountinfo, for a place of this machine where it is named.
func (l *lab) besides(t *testing.T, mounts string) string {
	t.Helper()
	name := filepath.Join(filepath.Dir(l.dir), mounts)
	switch {
	case mounts == "docker.sock":
		name = l.engine.Socket
	case mounts == "" || strings.HasSuffix(mounts, "\n"):
		return mounts
	}
	p, err := spawnerhook.Locate(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(p.Mountinfo("/mnt", "ro"), "900", "901", 1)
}

// everything has one verdict on all findings.
func everything(v spawnerhook.Verdict) spawnerhook.Posture {
	p := spawnerhook.Posture{}
	for _, name := range spawnerhook.FindingNames() {
		p[name] = v
	}
	return p
}

func TestTheConfigurationDecidesOnAFinding(t *testing.T) {
	sysAdmin := strings.Replace(readTestdata(t, "e2010-inspect-default.json"), `"CapAdd": null`, `"CapAdd": ["CAP_SYS_ADMIN"]`, 1)
	ipc := readTestdata(t, "e2010-inspect-ipc-host.json")
	for _, tt := range []struct {
		why, inspect string
		posture      spawnerhook.Posture
		refused      string // empty: bound
		warned       bool
	}{
		{"refused by default", sysAdmin, nil, "(--cap-add=SYS_ADMIN); start it without, or set servers.docker.posture: {sys_admin: allow}", false},
		{"allowed", sysAdmin, spawnerhook.Posture{"sys_admin": spawnerhook.Allow}, "", false},
		{"reported", sysAdmin, spawnerhook.Posture{"sys_admin": spawnerhook.Report}, "", true},
		{"reported by default", ipc, nil, "", true},
		{"refused", ipc, spawnerhook.Posture{"ipc_host": spawnerhook.Refuse}, "(--ipc=host); start it without, or set servers.docker.posture: {ipc_host: allow}", false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := newLab(t, func(c *spawnerhook.DockerConfig) { c.Posture = tt.posture })
			l.running(t, []byte(tt.inspect))
			w, err := l.docker.Bind(t.Context(), alice)
			if tt.refused != "" {
				wantDenied(t, err, tt.refused)
			} else if err != nil || len(w.Posture) != 1 {
				t.Errorf("Bind: got %+v, %v, want one finding", w, err)
			}
			if got := strings.Contains(l.log.String(), "weak posture"); got != tt.warned {
				t.Errorf("the log says so: %t, want %t", got, tt.warned)
			}
		})
	}
}

// Whoever allows everything has still not allowed a server without its directory.
func TestNoVerdictReplacesTheDirectory(t *testing.T) {
	l := newLab(t, func(c *spawnerhook.DockerConfig) { c.Posture = everything(spawnerhook.Allow) })
	p := l.running(t, nil)
	l.write(t, p.pid, "mountinfo", l.mountinfo(t, "rw"))
	_, err := l.docker.Bind(t.Context(), alice)
	wantDenied(t, err, "writable")
}

func TestAContainerThatCouldForgeLowersTheLevelWhileItRuns(t *testing.T) {
	l := newLab(t, func(c *spawnerhook.DockerConfig) { c.Trusted = []string{"hub"} })
	names := make(chan string, 100)
	watch(t, l.docker, func(name string) { names <- name })
	within(t, "first hint", names)
	privileged := []byte(readTestdata(t, "e29-inspect-privileged.json"))
	worth := func(want, because string) {
		t.Helper()
		await(t, "level "+want, func() bool {
			level, why := l.docker.Worth("pidfd+ns")
			return level == want && strings.Contains(why, because) && (because == "") == (why == "")
		})
	}
	start := func(e *brokertest.Engine, name string, inspect []byte) {
		l.engine.Start(name, l.process(t, e.Create(t, name, inspect)).pid)
	}
	worth("pidfd+ns", "")
	start(l.engine, "db", nil)
	start(l.engine, "hub", privileged)
	start(l.engine, "cadvisor", privileged)
	worth("pidfd", "the container cadvisor could forge proofs: it is privileged (--privileged); if you trust it, add it to servers.docker.trusted: [cadvisor]")
	if log := l.log.String(); strings.Count(log, "could forge the proofs of others") != 1 || strings.Contains(log, "container=hub") {
		t.Errorf("log: %s", log)
	}
	// What runs already is looked at anew when Docker is back, and what is gone is
	// forgotten.
	l.engine.Down()
	if err := l.engine.Up(); err != nil {
		t.Fatal(err)
	}
	within(t, "hint after a restart of the engine", names)
	worth("pidfd", "cadvisor")
	l.engine.Down()
	l.engine.Die("cadvisor")
	start(l.engine, "agent", privileged)
	if err := l.engine.Up(); err != nil {
		t.Fatal(err)
	}
	worth("pidfd", "the container agent could forge proofs")
	l.engine.Remove("agent")
	worth("pidfd+ns", "")
}

func TestTheFirstBindKnowsWhoCouldForge(t *testing.T) {
	l := newLab(t)
	d, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{Socket: l.engine.Socket, ProcRoot: l.proc, Directory: l.directory})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	l.running(t, nil)
	l.engine.Start("cadvisor", l.process(t, l.engine.Create(t, "cadvisor", []byte(readTestdata(t, "e29-inspect-privileged.json")))).pid)
	if _, err := d.Bind(t.Context(), alice); err != nil {
		t.Fatal(err)
	}
	if level, why := d.Worth("pidfd"); level != "proc" || !strings.Contains(why, "cadvisor") {
		t.Errorf("Worth: got %q, %q", level, why)
	}
}

func TestTracingForgesOnlyWhereOthersAreSeen(t *testing.T) {
	plain := readTestdata(t, "e2010-inspect-default.json")
	tracing := strings.Replace(plain, `"CapAdd": null`, `"CapAdd": ["CAP_SYS_PTRACE"]`, 1)
	for inspect, want := range map[string]bool{
		tracing: false,
		strings.Replace(tracing, `"PidMode": ""`, `"PidMode": "host"`, 1):        true,
		strings.Replace(tracing, `"PidMode": ""`, `"PidMode": "container:x"`, 1): true,
		strings.Replace(plain, `"PidMode": ""`, `"PidMode": "host"`, 1):          false,
	} {
		l := newLab(t)
		l.running(t, []byte(inspect))
		all, err := l.docker.Containers(t.Context())
		if err != nil || len(all) != 1 || !all[0].Server {
			t.Fatalf("Containers: got %+v, %v", all, err)
		}
		if got := all[0].Forges() != ""; got != want {
			t.Errorf("%+v forges: %t, want %t", all[0].Findings, got, want)
		}
	}
}

// Names of profiles as engines give them: 20.10 says default, those since 23 builtin.
func TestAnEngineThatClosesNoSystemCallsIsAFindingOfItsContainers(t *testing.T) {
	const (
		own  = `"SecurityOpt": ["no-new-privileges", "seccomp={\"defaultAction\":\"SCMP_ACT_ERRNO\"}"]`
		none = `"SecurityOpt": null`
	)
	for _, tt := range []struct {
		why      string
		security []string
		option   string
		want     string // in the refusal; empty: bound
	}{
		{"20.10", []string{"name=seccomp,profile=default"}, none, ""},
		{"since 23", []string{"name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"}, none, ""},
		{"the site's own", []string{"name=seccomp,profile=/etc/docker/seccomp.json"}, none, ""},
		{"the site's own, which is called like none", []string{"name=seccomp,profile=/etc/docker/unconfined"}, none, ""},
		{"unconfined", []string{"name=apparmor", "name=seccomp,profile=unconfined"}, none, "dockerd --seccomp-profile=unconfined"},
		{"unconfined, and another option", []string{"name=seccomp,profile=unconfined"}, `"SecurityOpt": ["apparmor=x"]`, "dockerd --seccomp-profile=unconfined"},
		{"unconfined, and an option that is empty", []string{"name=seccomp,profile=unconfined"}, `"SecurityOpt": ["seccomp=x", "seccomp="]`, "dockerd --seccomp-profile=unconfined"},
		{"unconfined, but the container is not", []string{"name=seccomp,profile=unconfined"}, own, ""},
		{"unconfined, and the container, too", []string{"name=seccomp,profile=unconfined"}, `"SecurityOpt": ["seccomp=unconfined"]`, "--security-opt seccomp=unconfined"},
		{"no seccomp", []string{"name=apparmor"}, none, "this Docker has no seccomp"},
		{"no seccomp, whatever the container asks for", nil, `"SecurityOpt": ["seccomp=builtin"]`, "this Docker has no seccomp"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := newLab(t)
			l.engine.Be([]string{"Engine"}, tt.security)
			if _, err := l.docker.Check(t.Context()); err != nil { // as at a start
				t.Fatal(err)
			}
			l.running(t, []byte(strings.Replace(readTestdata(t, "e2010-inspect-default.json"), none, tt.option, 1)))
			_, err := l.docker.Bind(t.Context(), alice)
			switch {
			case tt.want != "":
				wantDenied(t, err, tt.want)
				wantDenied(t, err, "servers.docker.posture: {seccomp_unconfined: allow}")
			case err != nil:
				t.Errorf("Bind: %v", err)
			}
		})
	}
}

func TestAnEngineThatComesBackWithOtherOptionsIsAskedAgain(t *testing.T) {
	l := newLab(t)
	names := make(chan string, 100)
	watch(t, l.docker, func(name string) { names <- name })
	within(t, "first hint", names)
	l.running(t, nil)
	l.bound(t)
	back := func(profile string) {
		t.Helper()
		l.engine.Down()
		l.engine.Be([]string{"Engine"}, []string{"name=seccomp,profile=" + profile})
		if err := l.engine.Up(); err != nil {
			t.Fatal(err)
		}
		for within(t, "hint after a restart of the engine", names) != "" {
		}
	}
	back("unconfined")
	_, err := l.docker.Bind(t.Context(), alice)
	wantDenied(t, err, "--seccomp-profile=unconfined")
	back("default")
	l.bound(t)
}
