package grpcserver

import (
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"tokenbroker/broker"
)

// A request is a message on its way in. If it can't be read, err says why.
type request struct {
	message any
	err     error
}

// A codec reads requests. gRPC answers by itself what its codec refuses, as an
// internal error that quotes the request; so this one never refuses a request,
// and receive does.
type codec struct{ encoding.CodecV2 }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*request)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	r.err = c.CodecV2.Unmarshal(data, r.message)
	return nil
}

// sendWithin is how long a caller may take to send a request. It is the same over
// HTTP. Tests shorten it for the servers they make.
var sendWithin = 10 * time.Second

// receive reads a request into m. A stream can't be told to read no longer, so
// whoever doesn't send what it began loses its connection.
func (c call) receive(read func(any) error, m any) error {
	r := request{message: m}
	patience := time.AfterFunc(c.sendWithin, func() { c.Close() })
	err := read(&r)
	late := !patience.Stop()
	switch {
	case late && err != nil:
		return broker.Errorf(broker.Limited, "the request did not arrive within %s", c.sendWithin)
	case r.err != nil:
		return broker.Errorf(broker.Invalid, "the request is not a valid message of its type")
	case status.Code(err) == codes.ResourceExhausted:
		// gRPC has said so already; this is for the audit.
		return broker.Errorf(broker.Invalid, "the request is larger than %d bytes", maxMessage)
	}
	return err
}
