package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// A format is how a command prints: as a table for people or as JSON for
// programs.
type format string

// String implements pflag.Value.
func (f *format) String() string {
	if *f == "" {
		return "table"
	}
	return string(*f)
}

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

// Set implements pflag.Value.
func (f *format) Set(s string) error {
	if s != "table" && s != "json" {
		return fmt.Errorf("there are table and json")
	}
	*f = format(s)
	return nil
}

// wantsJSON says whether -o json was given.
func wantsJSON(c *cobra.Command) bool { return c.Flag("output").Value.String() == "json" }

// printJSON prints v for programs.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// protoJSON returns m with the field names of the proto files. No message of
// the admin service holds a secret.
func protoJSON(m proto.Message) json.RawMessage {
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil { // only for strings that are not UTF-8, which no wire lets through
		data, _ = json.Marshal(err.Error())
	}
	return data
}

// A table aligns its cells.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer, head ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(head...)
	}
	return t
}

// row adds a row; empty cells show as a dash.
func (t table) row(cells ...string) {
	for i, c := range cells {
		if c == "" {
			c = "-"
		}
		cells[i] = strings.Map(printable, c)
	}
	fmt.Fprintln(t, strings.Join(cells, "\t"))
}

// printable keeps names from moving the cells or the terminal.
func printable(r rune) rune {
	if r < ' ' || r == 0x7f {
		return '?'
	}
	return r
}

// when prints a time, in UTC so that hosts can be compared.
func when(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04:05Z")
}

// short prints how long ago or ahead a time is.
func short(d time.Duration) string {
	d = d.Abs()
	switch {
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
