package redisstore

import (
	"errors"
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
)

// wrap says which record or set a call was about; nil stays nil.
func (s *Store) wrap(what string, k broker.Key, err error) error {
	if err == nil {
		return nil
	}
	return s.explain(fmt.Sprintf("%s %s %q", what, k.Kind, k.Parts), err)
}

// explain says what we were doing when err came.
func (s *Store) explain(what string, err error) error {
	return fmt.Errorf("%s in Redis: %w", what, s.clean(err))
}

// A refusal is what Redis itself answered, rather than the network. It begins
// with a word in capitals that says of which kind it is.
type refusal string

func (r refusal) Error() string { return string(r) }

// is reports whether r is of a kind. From within a script Redis puts ERR or
// more before it.
func (r refusal) is(kind string) bool { return strings.Contains(string(r), kind) }

// clean takes out of an answer of Redis what it may quote of our command. Other
// errors, of the network and of contexts, quote nothing and stay what they are.
func (s *Store) clean(err error) error {
	var answer redis.Error
	if !errors.As(err, &answer) {
		return err
	}
	text, _, _ := strings.Cut(answer.Error(), ", with args beginning with")
	if !s.cfg.Password.IsZero() {
		text = strings.ReplaceAll(text, s.cfg.Password.Reveal(), "[hidden]")
	}
	return refusal(text)
}
