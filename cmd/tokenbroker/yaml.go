package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"tokenbroker/broker"
)

// A Mistake is one thing that is wrong with a configuration file.
type Mistake struct {
	Line int    `json:"line"` // 0: the file as a whole
	Key  string `json:"key"`  // dotted, as in providers.keycloak.issuer
	Text string `json:"text"`
}

// Mistakes is everything that is wrong with a configuration file. It is an
// error if there is at least one.
type Mistakes []Mistake

// Error lists the mistakes, one a line.
func (ms Mistakes) Error() string {
	var b strings.Builder
	for i, m := range ms {
		if i > 0 {
			b.WriteByte('\n')
		}
		if m.Line > 0 {
			fmt.Fprintf(&b, "line %d: ", m.Line)
		}
		if m.Key != "" {
			fmt.Fprintf(&b, "%s: ", m.Key)
		}
		b.WriteString(m.Text)
	}
	return b.String()
}

func (ms Mistakes) sort() {
	slices.SortStableFunc(ms, func(a, b Mistake) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
}

// maxNodes bounds what aliases can blow a file up to.
const maxNodes = 100_000

// A decoder fills a struct from YAML and notes every mistake instead of
// stopping at the first, which is why it walks the nodes itself.
type decoder struct {
	lines    map[string]int // line of each key that was seen
	mistakes Mistakes
	nodes    int
	broken   bool // it is no YAML, or nothing
}

// decode reads one YAML document into v, a pointer to a struct.
func decode(data []byte, v any) *decoder {
	d := &decoder{lines: map[string]int{}}
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil {
		d.syntax(err)
		return d
	}
	if doc.Content[0].Tag == "!!null" {
		d.syntax(io.EOF)
		return d
	}
	d.value(doc.Content[0], "", reflect.ValueOf(v).Elem())
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		d.add(0, "", "the file holds more than one document")
	}
	return d
}

func (d *decoder) add(line int, key, text string, args ...any) {
	d.mistakes = append(d.mistakes, Mistake{line, key, fmt.Sprintf(text, args...)})
}

// syntax notes what the YAML parser says; it names a line only in its text.
func (d *decoder) syntax(err error) {
	d.broken = true
	if errors.Is(err, io.EOF) {
		d.add(0, "", "the file is empty")
		return
	}
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, what, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				line, text = n, what
			}
		}
	}
	d.add(line, "", "%s", text)
}

var (
	durationType   = reflect.TypeFor[time.Duration]()
	serverNameType = reflect.TypeFor[broker.ServerName]()
)

// value fills v from n.
func (d *decoder) value(n *yaml.Node, key string, v reflect.Value) {
	if d.nodes++; d.nodes > maxNodes {
		if d.nodes == maxNodes+1 {
			d.add(n.Line, key, "the file is too large")
		}
		return
	}
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Tag == "!!null" {
		d.add(n.Line, key, "has no value; leave the key out or give it one")
		return
	}
	switch {
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, key, v.Elem())
	case v.Kind() == reflect.Struct:
		d.structure(n, key, v)
	case v.Kind() == reflect.Map:
		d.mapping(n, key, v)
	case v.Kind() == reflect.Slice:
		d.sequence(n, key, v)
	case n.Kind != yaml.ScalarNode:
		d.add(n.Line, key, "wants %s", wants(v.Type()))
	default:
		d.scalar(n, key, v)
	}
}

// wants says in words what a value of type t looks like.
func wants(t reflect.Type) string {
	switch {
	case t == durationType:
		return "a time with its unit, like 90s or 5m"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "a text"
	case t.Kind() == reflect.Slice:
		return "a list"
	case t.Kind() == reflect.Map, t.Kind() == reflect.Struct:
		return "a block of keys"
	}
	return "a number"
}

func (d *decoder) scalar(n *yaml.Node, key string, v reflect.Value) {
	ok := true
	switch {
	case v.Type() == durationType:
		t, err := time.ParseDuration(n.Value)
		ok = err == nil && t >= 0
		v.SetInt(int64(t))
	case v.Kind() == reflect.String:
		// A client ID may be all digits, so a number will do for a text.
		// Empty is the name of the default server, and nothing else.
		ok = n.Tag != "!!bool" && (n.Value != "" || v.Type() == serverNameType)
		v.SetString(n.Value)
	default:
		ok = n.Decode(v.Addr().Interface()) == nil
	}
	if !ok {
		d.add(n.Line, key, "%s is not %s", strconv.Quote(n.Value), wants(v.Type()))
	}
}

// structure fills a struct by the yaml tags of its fields.
func (d *decoder) structure(n *yaml.Node, key string, v reflect.Value) {
	fields := fieldsOf(v)
	d.pairs(n, key, v.Type(), func(k, val *yaml.Node, sub string) {
		f, ok := fields[k.Value]
		if !ok {
			d.unknown(k, sub, fields)
			return
		}
		d.value(val, sub, f)
	})
}

// fieldsOf returns the fields of a struct by their keys.
func fieldsOf(v reflect.Value) map[string]reflect.Value {
	fields := map[string]reflect.Value{}
	for i := range v.NumField() {
		name, option, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		if option == "inline" {
			maps.Copy(fields, fieldsOf(v.Field(i)))
			continue
		}
		fields[name] = v.Field(i)
	}
	return fields
}

// unknown notes a key that means nothing here.
func (d *decoder) unknown(k *yaml.Node, key string, fields map[string]reflect.Value) {
	best, least := "", 3 // two typing errors at most
	for name := range fields {
		if n := distance(k.Value, name); n < least || n == least && n < 3 && name < best {
			best, least = name, n
		}
	}
	if best != "" {
		d.add(k.Line, key, "unknown key; did you mean %s?", best)
		return
	}
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	d.add(k.Line, key, "unknown key; known are %s", strings.Join(names, ", "))
}

func (d *decoder) mapping(n *yaml.Node, key string, v reflect.Value) {
	v.Set(reflect.MakeMap(v.Type()))
	d.pairs(n, key, v.Type(), func(k, val *yaml.Node, sub string) {
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(val, sub, e)
		v.SetMapIndex(reflect.ValueOf(k.Value).Convert(v.Type().Key()), e)
	})
}

// pairs calls each for the keys of a mapping, once each.
func (d *decoder) pairs(n *yaml.Node, key string, t reflect.Type, each func(k, v *yaml.Node, key string)) {
	if n.Kind != yaml.MappingNode {
		d.add(n.Line, key, "wants %s", wants(t))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		sub := strings.TrimPrefix(key+"."+k.Value, ".")
		switch first := seen[k.Value]; {
		case k.Kind != yaml.ScalarNode || k.Value == "":
			d.add(k.Line, key, "has a key that is not a word")
		case first != 0:
			d.add(k.Line, sub, "is here twice, first in line %d", first)
		default:
			seen[k.Value], d.lines[sub] = k.Line, k.Line
			each(k, v, sub)
		}
	}
}

func (d *decoder) sequence(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.SequenceNode {
		d.add(n.Line, key, "wants a list")
		return
	}
	for i, item := range n.Content {
		if d.nodes > maxNodes {
			return
		}
		e, sub := reflect.New(v.Type().Elem()).Elem(), fmt.Sprintf("%s[%d]", key, i)
		d.lines[sub] = item.Line
		d.value(item, sub, e)
		v.Set(reflect.Append(v, e))
	}
}

// distance is the number of single-letter changes between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
