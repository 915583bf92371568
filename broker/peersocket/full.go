package peersocket

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"
)

var errTooMany = errors.New("the socket has as many connections as it may")

// tooMany is what a caller is told when a socket is full.
const tooMany = `{"title":"Too Many Requests","status":429,"code":"limited",` +
	`"detail":"this server has too many connections to the token broker open",` +
	`"next":"close some, or keep one and use it again","retry_after":1}`

// turnAway tells the caller why, if it has said already which protocol it
// speaks. It is quick, since the door is not served meanwhile.
func turnAway(c *net.UnixConn) {
	c.SetDeadline(time.Now().Add(20 * time.Millisecond))
	first := make([]byte, firstRead)
	n, _ := c.Read(first)
	switch grpc, clear := protocol(first[:n]); {
	case !clear:
	case grpc:
		c.Write(goAway("too many connections"))
	default:
		fmt.Fprintf(c, "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/problem+json\r\nCache-Control: no-store\r\n"+
			"Retry-After: 1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(tooMany), tooMany)
	}
}

// goAway is an HTTP/2 server's shortest refusal: empty settings, then GOAWAY
// with ENHANCE_YOUR_CALM (RFC 9113, sections 6.5 and 6.8). A gRPC client reports
// it as UNAVAILABLE and tries again later.
func goAway(why string) []byte {
	const settings, goaway, enhanceYourCalm = 4, 7, 11
	b := []byte{0, 0, 0, settings, 0, 0, 0, 0, 0}
	b = append(b, 0, 0, byte(8+len(why)), goaway, 0, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, 0) // no stream was served
	b = binary.BigEndian.AppendUint32(b, enhanceYourCalm)
	return append(b, why...)
}
