package broker

// Sockets opens and closes the servers' listeners. What is accepted on them
// reaches the edges as connections that know their Peer.
//
// All methods may be called from many goroutines at once.
type Sockets interface {
	// Directory returns the directory of k on this host; it is the same for
	// ever and needs not exist. The error says that the path would be too long
	// for a Unix socket.
	Directory(k ServerKey) (string, error)

	// Open makes the directory of k and its socket, and listens. What is there
	// already stays: the directory keeps its inode, so that a container that
	// mounts it sees the new socket. Opening an open one is no error.
	Open(k ServerKey) error

	// Hangup ends those connections of k whose peer is meant, and goes on
	// listening.
	Hangup(k ServerKey, meant func(*Peer) bool)

	// Close stops listening and ends the connections of k. The directory
	// stays: a kept container mounts its inode, not its name. Closing what is
	// not open is no error.
	Close(k ServerKey) error
}
