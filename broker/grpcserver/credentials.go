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

// peerInfo is a connection's AuthInfo.
type peerInfo struct {
	credentials.CommonAuthInfo
	peer *broker.Peer
}

func (peerInfo) AuthType() string { return "peer" }

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	known, ok := c.(interface{ Peer() *broker.Peer })
	if !ok {
		return nil, nil, errors.New("a connection whose peer is not known")
	}
	level := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return c, peerInfo{level, known.Peer()}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are a server's")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peer"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }

// peerOf returns who makes a call, or nil if that is not known.
func peerOf(ctx context.Context) *broker.Peer {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, _ := p.AuthInfo.(peerInfo)
	return info.peer
}
