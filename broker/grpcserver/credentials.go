package grpcserver

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"tokenbroker/broker"
)

// peerCredentials hands the Peer of a connection on to the calls that come in
// over it. There is nothing to shake hands about: the kernel has said who calls.
type peerCredentials struct{}

// A caller is a connection that knows its Peer and counts the requests that come
// in over it.
type caller interface {
	net.Conn
	Peer() *broker.Peer
	Begin() (end func(), err error)
}

// peerInfo is a connection's AuthInfo.
type peerInfo struct {
	credentials.CommonAuthInfo
	caller caller
}

func (peerInfo) AuthType() string { return "peer" }

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	known, ok := c.(caller)
	if !ok {
		return nil, nil, errors.New("a connection whose peer is not known")
	}
	level := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return c, peerInfo{level, known}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are a server's")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peer"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }

// callerOf returns the connection that a call came in over, or nil if that is not
// known.
func callerOf(ctx context.Context) caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, _ := p.AuthInfo.(peerInfo)
	return info.caller
}

// peerOf returns who makes a call, or nil if that is not known.
func peerOf(ctx context.Context) *broker.Peer {
	if c := callerOf(ctx); c != nil {
		return c.Peer()
	}
	return nil
}
