package spawnerhook

// What the tests see of the parsers, and of what decides.

type (
	CgroupLine = cgroupLine
	Place      = place
	Mount      = mount
)

var (
	ParseCgroups    = parseCgroups
	OwnCgroups      = ownCgroups
	SameCgroups     = sameCgroups
	ParseMountinfo  = parseMountinfo
	MountAt         = mountAt
	MountWeaknesses = mountWeaknesses
	DirectoryFault  = directoryFault
	ParseStart      = parseStart
)

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
