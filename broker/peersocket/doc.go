// Package peersocket opens the broker's Unix sockets: one per server, one per
// hub, one for the administrator. What comes in is a connection that knows its
// Peer, the process at the other end as the kernel names it.
//
// Each socket speaks two protocols. The first bytes of a connection decide
// which: HTTP/2 begins with "PRI ", and that is gRPC; anything else is HTTP/1.1.
// So every opening here offers two net.Listeners, GRPC and HTTP, and the
// connections of all servers meet in the same pair.
//
// A container reaches its socket through a mounted directory. The directory
// keeps its inode for ever, since a mount follows the inode and not the name;
// only the socket in it is replaced.
package peersocket
