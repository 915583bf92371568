// Package attacks is the list of what a hostile container, its owner and the
// processes around it try in order to get somebody else's token. Each is tried on
// a real Docker engine, against a real `tokenbroker serve` on a real
// redis-server, and makes one line of the table that is printed at the end: what
// was tried, what the answer was, and why, as the audit has it.
//
//	go test -count=1 -v ./deploy/attacks                                  prints the table
//	go test -count=1 -v ./deploy/attacks -args -engine /path/docker.sock  on another engine
//	go test -count=1 -v ./deploy/attacks -args -tags TAG                  a broker built with a tag
//	deploy/site/try                                                       the unit, under a real systemd
//
// It needs root, Docker 20.10 or later and redis-server 7. The image holds one
// program, testdata/attacker. The hub is played by the test, which says on the
// hub's socket what the hooks say; the provider is broker/devidp.
//
//	process_test.go    processes of the host and of other containers; namespaces; cgroups
//	mount_test.go      our directories, by all ways that Docker mounts them
//	identity_test.go   labels, names, restarts, descriptors and process numbers
//	protocol_test.go   floods, and what is no honest request
//	hub_test.go        handles, logins and registrations that are another's
//	policy_test.go     scopes and audiences; a provider that does not narrow
//	design_test.go     what is allowed by design, and what is not protected
//	alone_test.go      what holds the provider, or stops or freezes the broker
//	systemd_test.go    the broker as the unit of deploy/site, installed by the README's commands
//	firstday_test.go   what an administrator then sees of it; with the build tag unit only
//
// At the end the whole audit is read: no token went to a container of another
// user, and each one to somebody whom the test knows.
package attacks_test
