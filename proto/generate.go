// Package proto holds the broker's wire: three services for three audiences,
// so that a container cannot even name a method of the hub.
//
// The generated code is committed; "go generate ./proto" makes it again with the
// tools that tools/go.mod pins, and deploy/test fails if it differs.
package proto

//go:generate go tool -modfile=../tools/go.mod buf lint
//go:generate go tool -modfile=../tools/go.mod buf generate
