package spawnerhook

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// A Verdict is what becomes of a container of which something was found.
type Verdict string

const (
	Refuse Verdict = "refuse" // it gets no tokens
	Report Verdict = "report" // it gets them; log and audit say what was found
	Allow  Verdict = "allow"  // it gets them; the audit says what was found
)

// Verdicts are all there are.
func Verdicts() []Verdict { return []Verdict{Refuse, Report, Allow} }

// A Posture says by name what becomes of findings; the others have the verdict of
// the table.
type Posture map[string]Verdict

// A Finding is something that a container's posture gives away.
type Finding struct {
	Name    string  `json:"name"` // as in Posture
	Verdict Verdict `json:"verdict"`
	Says    string  `json:"says"`             // with the option that makes it
	Forges  bool    `json:"forges,omitempty"` // a process in it can pass for one of another container
}

// A Container is one that runs, and what its posture gives away.
type Container struct {
	Name     string    `json:"name"`
	Server   bool      `json:"server"` // it mounts a directory at MountPoint
	Findings []Finding `json:"findings"`

	id    string
	execs []string // IDs of what was begun in it from outside and has not ended
}

// Refused says whether it would get no tokens.
func (c Container) Refused() bool {
	return slices.ContainsFunc(c.Findings, func(f Finding) bool { return f.Verdict == Refuse })
}

// Forges says in words what a process in it could forge proofs by. Empty: nothing.
func (c Container) Forges() string {
	var says []string
	for _, f := range c.Findings {
		if f.Forges {
			says = append(says, f.Says)
		}
	}
	return strings.Join(says, "; ")
}

// TrustOption says what ends that a container of that name lowers the level.
func TrustOption(name string) string {
	return fmt.Sprintf("if you trust it, add it to servers.docker.trusted: [%s]", name)
}

// FindingNames are the names of all findings, in the order of the table.
func FindingNames() []string {
	var names []string
	for _, w := range weaknesses {
		names = append(names, w.name)
	}
	return names
}

// An evidence is what Docker and the kernel say of one container, and where on this
// host the things are that it should not have.
type evidence struct {
	posture
	mounts []mount // of its first process, as the kernel shows them
	v2     bool    // its only cgroup is in the hierarchy of version 2
	host   host
}

// A posture is what of a container's configuration bears on identity, in Docker's
// words.
type posture struct {
	Privileged                                              bool
	PidMode, NetworkMode, IpcMode, UsernsMode, CgroupnsMode string
	Runtime                                                 string
	CapAdd, SecurityOpt                                     []string
	MaskedPaths, ReadonlyPaths                              []string
	Devices, DeviceCgroupRules                              []string

	NoSeccomp, SeccompOff bool // of the whole engine, see engineInfo
}

// A host is where things are. A place that is not known has no device, which is
// nobody's.
type host struct {
	root, proc, sys, run place
	sockets              []place // whoever reaches one is root on the host
	private              []place // the broker's own files and directories
	own                  place   // the directory of the server that is looked at
}

// A weakness is one row of the table.
type weakness struct {
	name    string
	verdict Verdict // unless the configuration says otherwise
	forges  func(*evidence) bool
	found   func(*evidence) string // what was found, with the option that makes it; empty: nothing
}

// The table. Refused is what lets a container become another one, or the host;
// reported is what does so only together with something else that is refused. The
// kernel is asked where it can be: Docker's list of mounts shows neither what a
// symlink leads to nor what a volume is made of.
var weaknesses = []weakness{
	{"privileged", Refuse, always, when("it is privileged (--privileged)", func(e *evidence) bool { return e.Privileged })},
	{"all_capabilities", Refuse, always, capability("ALL", "it has all capabilities (--cap-add=ALL)")},
	{"sys_admin", Refuse, always, capability("SYS_ADMIN", "it has the capability SYS_ADMIN (--cap-add=SYS_ADMIN)")},
	{"sys_ptrace", Refuse, seesOthers, capability("SYS_PTRACE", "it may trace processes (--cap-add=SYS_PTRACE)")},
	{"sys_module", Refuse, always, capability("SYS_MODULE", "it may load kernel modules (--cap-add=SYS_MODULE)")},
	{"sys_rawio", Refuse, always, capability("SYS_RAWIO", "it has raw access to devices (--cap-add=SYS_RAWIO)")},
	{"dac_read_search", Refuse, always, capability("DAC_READ_SEARCH", "it may read the host's files (--cap-add=DAC_READ_SEARCH)")},
	{"bpf", Refuse, never, capability("BPF", "it may load programs into the kernel (--cap-add=BPF)")},
	{"checkpoint_restore", Refuse, never, capability("CHECKPOINT_RESTORE", "it may choose the numbers of processes (--cap-add=CHECKPOINT_RESTORE)")},
	{"other_capabilities", Report, never, otherCapabilities},
	{"pid_host", Refuse, never, when("it sees the host's processes (--pid=host)", func(e *evidence) bool { return e.PidMode == "host" })},
	{"pid_container", Refuse, never, when("it sees another container's processes (--pid=container:…)", func(e *evidence) bool { return strings.HasPrefix(e.PidMode, "container:") })},
	{"network_host", Refuse, never, when("it uses the host network (--network=host)", func(e *evidence) bool { return e.NetworkMode == "host" })},
	{"network_container", Report, never, when("it uses another container's network, and what listens on its localhost (--network=container:…)",
		func(e *evidence) bool { return strings.HasPrefix(e.NetworkMode, "container:") })},
	{"ipc_host", Report, never, when("it shares memory with the host (--ipc=host)", func(e *evidence) bool { return e.IpcMode == "host" })},
	{"ipc_container", Report, never, when("it shares memory with another container (--ipc=container:…)", func(e *evidence) bool { return strings.HasPrefix(e.IpcMode, "container:") })},
	// Without userns-remap, which is refused as a whole, this changes nothing.
	{"userns_host", Allow, never, when("it has the host's users (--userns=host)", func(e *evidence) bool { return e.UsernsMode == "host" })},
	// On cgroup v1 it is how Docker starts them all.
	{"cgroupns_host", Report, never, when("it sees the host's cgroups (--cgroupns=host)", func(e *evidence) bool { return e.v2 && e.CgroupnsMode == "host" })},
	{"seccomp_unconfined", Refuse, never, withoutSeccomp},
	{"apparmor_unconfined", Refuse, never, option("apparmor", "unconfined", "AppArmor does not confine it (--security-opt apparmor=unconfined)")},
	// Its root is the host's to the files of /proc/sys, core_pattern among them.
	{"system_paths", Refuse, always, when("paths of /proc and /sys are open to it that Docker closes (--security-opt systempaths=unconfined)",
		func(e *evidence) bool { return !e.Privileged && (len(e.MaskedPaths) == 0 || len(e.ReadonlyPaths) == 0) })},
	{"writable_cgroups", Refuse, always, writableCgroups},
	{"raw_devices", Refuse, always, rawDevices},
	{"devices", Report, never, devices},
	{"device_cgroup_rules", Report, never, deviceRules},
	// Read-only doesn't help: connecting needs no writing.
	{"docker_socket", Refuse, always, mounted("it has the Docker socket (in what is mounted at %s)",
		func(e *evidence, m mount) bool { return slices.ContainsFunc(e.host.sockets, m.reaches) })},
	{"host_root", Refuse, never, mounted("it has all of the host's files (mounted at %s)",
		func(e *evidence, m mount) bool { return m.place == e.host.root })},
	{"host_proc", Refuse, writesHostProc, mounted("it has the host's /proc (mounted at %s)", hostProc)},
	{"host_sys", Refuse, never, mounted("it has the host's /sys (mounted at %s)", hostSys)},
	{"host_run", Refuse, never, mounted("it has the host's /run (mounted at %s)",
		func(e *evidence, m mount) bool { return m.place == e.host.run })},
	{"broker_directories", Refuse, never, mounted("it has directories of the broker's, or of another server (mounted at %s)", brokerDirectory)},
	{"runtime", Report, never, otherRuntime},
}

func always(*evidence) bool { return true }
func never(*evidence) bool  { return false }

// seesOthers is what makes tracing more than a debugger's business.
func seesOthers(e *evidence) bool {
	return e.PidMode == "host" || strings.HasPrefix(e.PidMode, "container:")
}

// when is a row's finding that needs no more words.
func when(says string, is func(*evidence) bool) func(*evidence) string {
	return func(e *evidence) string {
		if is(e) {
			return says
		}
		return ""
	}
}

// capability is an added capability, as Docker keeps it or as it was typed.
func capability(name, says string) func(*evidence) string {
	return when(says, func(e *evidence) bool { return slices.Contains(e.capabilities(), name) })
}

func (p posture) capabilities() []string {
	var all []string
	for _, c := range p.CapAdd {
		all = append(all, strings.TrimPrefix(strings.ToUpper(c), "CAP_"))
	}
	return all
}

// knownCapabilities are those that Docker gives every container, and those with
// rows of their own.
var knownCapabilities = strings.Fields("CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP " +
	"ALL SYS_ADMIN SYS_PTRACE SYS_MODULE SYS_RAWIO DAC_READ_SEARCH BPF CHECKPOINT_RESTORE")

func otherCapabilities(e *evidence) string {
	other := slices.DeleteFunc(e.capabilities(), func(c string) bool { return slices.Contains(knownCapabilities, c) })
	if len(other) == 0 {
		return ""
	}
	return fmt.Sprintf("it has capabilities that Docker does not give (--cap-add=%s)", strings.Join(other, ", "))
}

// option is a --security-opt. Docker also takes a colon between the two.
func option(key, value, says string) func(*evidence) string {
	return when(says, func(e *evidence) bool {
		return slices.Contains(e.SecurityOpt, key+"="+value) || slices.Contains(e.SecurityOpt, key+":"+value)
	})
}

var seccompUnconfined = option("seccomp", "unconfined", "no system call is closed to it (--security-opt seccomp=unconfined)")

// withoutSeccomp is the container's own option, or the engine's where it has none.
func withoutSeccomp(e *evidence) string {
	if says := seccompUnconfined(e); says != "" {
		return says
	}
	own := "" // of several the last one counts
	for _, o := range e.SecurityOpt {
		for _, key := range []string{"seccomp=", "seccomp:"} {
			if value, ok := strings.CutPrefix(o, key); ok {
				own = value
			}
		}
	}
	switch {
	case e.NoSeccomp:
		return "no system call is closed to it, for this Docker has no seccomp"
	case e.SeccompOff && own == "":
		return "no system call is closed to it (dockerd --seccomp-profile=unconfined)"
	}
	return ""
}

// mounted is the first mount that is so.
func mounted(says string, is func(*evidence, mount) bool) func(*evidence) string {
	return func(e *evidence) string {
		i := slices.IndexFunc(e.mounts, func(m mount) bool { return is(e, m) })
		if i < 0 {
			return ""
		}
		return fmt.Sprintf(says, e.mounts[i].point)
	}
}

// writableCgroups names the first of them: v1 has a dozen.
func writableCgroups(e *evidence) string {
	return mounted("it can write to the host's cgroups (mounted at %s)", func(_ *evidence, m mount) bool {
		return (m.fsType == "cgroup" || m.fsType == "cgroup2") && !m.readOnly
	})(e)
}

// hostProc is the host's own /proc. A container has one of its own, unless it sees
// the host's processes; graphics drivers mount files of the host's driver.
func hostProc(e *evidence, m mount) bool {
	return m.fsType == "proc" && m.device == e.host.proc.device && !under(m.path, "/driver") &&
		!(e.PidMode == "host" && under(m.point, "/proc"))
}

func writesHostProc(e *evidence) bool {
	return slices.ContainsFunc(e.mounts, func(m mount) bool { return hostProc(e, m) && !m.readOnly })
}

// hostSys is the host's own /sys, which a container on the host network has too,
// but read-only.
func hostSys(e *evidence, m mount) bool {
	return m.fsType == "sysfs" && m.device == e.host.sys.device &&
		!(e.NetworkMode == "host" && under(m.point, "/sys") && m.readOnly)
}

// brokerDirectory is any of ours but the server's own.
func brokerDirectory(e *evidence, m mount) bool {
	return m.place != e.host.own && slices.ContainsFunc(e.host.private, func(p place) bool {
		return m.reaches(p) || m.device == p.device && under(m.path, p.path)
	})
}

// rawDevices are what the host's disks and memory can be reached by.
func rawDevices(e *evidence) string {
	for _, d := range e.Devices {
		if rawDevice(d) {
			return fmt.Sprintf("it has a disk or the memory of the host (--device=%s)", d)
		}
	}
	for _, rule := range e.DeviceCgroupRules {
		for _, beginning := range []string{"a", "b", "c *:", "c 1:"} {
			if strings.HasPrefix(rule, beginning) {
				return fmt.Sprintf("it may make devices for the host's disks or memory (--device-cgroup-rule=%q)", rule)
			}
		}
	}
	return ""
}

// rawDevice goes by the name, too: the broker may not see the host's /dev.
func rawDevice(path string) bool {
	info, err := os.Stat(path)
	if err == nil && info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0 {
		return true
	}
	path = strings.TrimSuffix(path, "/")
	return path == "/dev" || slices.ContainsFunc([]string{"mem", "kmem", "port", "sd", "hd", "vd", "xvd", "nvme", "dm-", "md", "loop", "mapper/", "disk"},
		func(name string) bool { return strings.HasPrefix(path, "/dev/"+name) })
}

func devices(e *evidence) string {
	if len(e.Devices) == 0 {
		return ""
	}
	return fmt.Sprintf("it has devices of the host (--device=%s)", strings.Join(e.Devices, ", "))
}

func deviceRules(e *evidence) string {
	if len(e.DeviceCgroupRules) == 0 {
		return ""
	}
	return fmt.Sprintf("it may make devices (--device-cgroup-rule=%q)", strings.Join(e.DeviceCgroupRules, ", "))
}

func otherRuntime(e *evidence) string {
	if e.Runtime == "" || e.Runtime == "runc" {
		return ""
	}
	return fmt.Sprintf("it runs under another runtime (--runtime=%s)", e.Runtime)
}

// findings goes through the table.
func (e *evidence) findings(p Posture) []Finding {
	var all []Finding
	for _, w := range weaknesses {
		says := w.found(e)
		if says == "" {
			continue
		}
		f := Finding{Name: w.name, Verdict: w.verdict, Says: says, Forges: w.forges(e)}
		if v, ok := p[w.name]; ok {
			f.Verdict = v
		}
		all = append(all, f)
	}
	return all
}

// refusal says what of the findings is refused, and which keys of the
// configuration would let it pass. Empty: nothing.
func refusal(all []Finding) string {
	var says, keys []string
	for _, f := range all {
		if f.Verdict == Refuse {
			says, keys = append(says, f.Says), append(keys, f.Name+": allow")
		}
	}
	if len(says) == 0 {
		return ""
	}
	return fmt.Sprintf("%s; start it without, or set servers.docker.posture: {%s}", strings.Join(says, "; "), strings.Join(keys, ", "))
}

// directoryFault says in which way the container does not hold its server's
// directory as it must. Empty: it does. It is no finding that could be allowed:
// the mount is one of the three proofs.
func directoryFault(mounts []mount, dir place) string {
	m, ok := mountAt(mounts, MountPoint)
	switch {
	case !ok:
		return "it does not mount its server's directory at " + MountPoint
	case m.place != dir:
		return "it does not mount its server's directory but another one at " + MountPoint
	case !m.readOnly:
		return "it mounts its server's directory writable at " + MountPoint + "; that must be read-only"
	}
	for _, m := range mounts {
		if m.reaches(dir) && !m.readOnly {
			return fmt.Sprintf("it can write to its server's directory (in what is mounted at %s)", m.point)
		}
	}
	return ""
}
