// Package spawnerhook says which process runs in which single-user server. It
// holds the two attestors of the broker: Docker, for servers in containers, and
// Process, for servers that are plain processes of their own uid.
//
// Docker binds a registration to a container once per start of the container
// (bind_linux.go) and then attests each caller by asking only the kernel
// (attest_linux.go). Three rules carry it; each was broken on a real machine
// before it was written down:
//
//   - Paths are compared whole. A container started with
//     --cgroup-parent=/docker/<victim> has the victim's path as a prefix of its
//     own, and a container can name a cgroup of its own like the victim's.
//   - A process is what its pidfd says. Numbers are reused; a zombie still takes
//     signals. So liveness is poll(pidfd) after everything else was read, which
//     also proves that what was read under the number was this process.
//   - A container that is just ending reads "/" for its cgroups while Docker
//     still calls it running. So only lines that end in the container's own full
//     ID are recorded, and what doesn't fit is looked at again, never guessed.
//
// What a container must not have is one table, posture.go. Containers that could
// forge all of this, whoever's they are, are looked for in neighbours_linux.go.
// What is run in containers from outside, seen or found, is in execs_linux.go.
//
// The build tag nopidfd leaves out what kernels before 6.5 lack (SO_PEERPIDFD,
// PIDFD_GET_INFO), so that the same tests hold there:
//
//	go test -tags nopidfd ./broker/peersocket ./spawnerhook
//
// Only engine_linux.go knows the Docker client's types.
package spawnerhook
