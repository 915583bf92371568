package spawnerhook

import (
	"context"
	"os"
)

// What the tests see of the parsers, and of what decides.

type (
	CgroupLine = cgroupLine
	Place      = place
	Mount      = mount
)

var (
	ParseCgroups   = parseCgroups
	OwnCgroups     = ownCgroups
	SameCgroups    = sameCgroups
	ParseMountinfo = parseMountinfo
	MountAt        = mountAt
	DirectoryFault = directoryFault
	ParseStart     = parseStart
)

// LookAround is what the first Bind does before it binds.
func (d *Docker) LookAround(ctx context.Context) error { return d.lookAroundOnce(ctx) }

// Found lists the names of what is found in mounts on a host whose root is known.
func Found(mounts []Mount, root Place, sockets []Place) []Finding {
	e := &evidence{mounts: mounts, host: host{root: root, sockets: sockets}}
	e.MaskedPaths, e.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
	return e.findings(nil)
}

// TellsCgroups says whether this kernel tells a process's cgroup by number.
func TellsCgroups() bool {
	self, err := openPidfd(int32(os.Getpid()))
	if err != nil {
		return false
	}
	defer self.Close()
	_, err = cgroupID(self)
	return err == nil
}

// Defaults are the verdicts where the configuration says nothing.
func Defaults() Posture {
	p := Posture{}
	for _, w := range weaknesses {
		p[w.name] = w.verdict
	}
	return p
}

func NewPlace(device, path string) Place { return place{device, path} }

// Locate is how the attestor finds a directory.
func Locate(name string) (Place, error) { return new(locator).locate(name) }

// Mountinfo writes the place as a line of mountinfo, mounted read-only or not.
func (p place) Mountinfo(point, options string) string {
	return "900 1 " + p.device + " " + p.path + " " + point + " " + options + " - ext4 /dev/vda rw\n"
}

// Place is what is mounted.
func (m mount) Place() Place { return m.place }

// AllCgroups records every line, so that a process outside of containers can be
// the container of a benchmark.
func AllCgroups(lines []cgroupLine) map[string]string {
	all := map[string]string{}
	for _, l := range lines {
		all[l.hierarchy] = l.path
	}
	return all
}
