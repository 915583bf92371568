// Package broker is the token broker's domain: who gets which access token, and
// how a refresh token is kept. It imports the standard library and broker/seal;
// Redis, Docker, the providers and the wire are adapters around it.
//
// # Flows, and where they are
//
//	login       login.go     Login → pending grant, handle; Claim → link, live grant
//	            hubtoken.go  the hub's own token, narrowed to the hub's scopes
//	spawn       registry.go  Register → directory, socket; Unregister
//	            bind.go      Docker and the kernel confirm the container
//	            sweep.go     servers and users that the hub no longer has
//	            strays.go    containers that no server is registered for
//	            hubfacts.go  the hub's groups, and who else may open a server
//	token       token.go     attest, match, decide, cache, refresh, narrow, confirm, record
//	            watch.go     the same again whenever something changes
//	refresh     refresh.go   begin, send, settle: the write that can't be lost
//	            keepalive.go a long computation keeps its session
//	roles       recheck.go   what changes at the provider between refreshes; LookNow
//	                         follows a hint of anybody's that something changed
//	            failpoint.go where deploy/faults kills it
//	            heal.go      a store that fell back is put right from journal.go
//	disconnect  revoke.go    epoch and tombstone up, then the revision; also by a logout
//	            revocation.go the provider is told of what had been handed out
//	            roleloss.go  a lost role or group ends the session or stops servers, by rule
//	            logout.go    a logout token of the provider's ends grants, or has them looked at
//	notes       note.go      what brokers tell each other, so that none need ask often
//	rebind      users.go     a user's name becomes another account's, which inherits nothing
//	tell        outlook.go   why a grant is as it is, and what happens to it next
//	            explain.go   how a request would be answered, by the same steps
//
// Keys that seal the records are changed by keys.go, while brokers run.
//
// Decisions are in policy.go, what is said to callers in error.go, what is
// written down in audit.go: as a chain (auditchain.go), storms counted (auditstorm.go), into
// auditfile.go, read again by auditverify.go. The four interfaces are Store, Attestor, Provider
// and Sockets; their comments are their contracts.
//
// # Fences
//
// A grant carries two counters. Version moves with each new refresh token, so
// that the answer to an old one is not stored over a newer. Epoch moves with
// each change of rights, so that what was decided before is void. Whoever moves
// an epoch moves the deployment's revision afterwards, and no answer leaves
// unless the revision it rests on was current at most 250 ms before. It also tells
// the other brokers, which then confirm at once; nothing rests on their hearing it.
//
// # A store that falls back
//
// It has restarted, or another server has its place, or its revision fell: what it
// has may be older than what has been answered. Each broker looks once a second at
// least, whether somebody asks or not, and then writes again what its journal knows:
// what it wrote itself, and the epochs, roles and disconnects of others that it has
// read. Until all have had the time for that (3 s) none answers. A disconnect is
// answered once the store has settled, so only one whose answer said that it may be
// forgotten, or a backup that is put back, can undo what nobody knows who is left.
//
// # Promises
//
// What is promised of a grant, and the test that is named after it, in
// promises_test.go; with real processes, Redis and kills it is in deploy/faults, at
// random in model_test.go.
//
//	at most one refresh is in flight, over all brokers    TestPromiseAtMostOneRefreshInFlightPerGrant
//	a caller's end, however it comes, does nothing to it  TestPromiseWhatHappensToACallerNeverAffectsAGrant
//	a refresh that failed marks it and never deletes it   TestPromiseNoGrantIsDeletedBecauseARefreshFailed
//	no write to the store, no use of the refresh token    TestPromiseNoRefreshTokenIsSpentWhileTheStoreCantAcceptAWrite
//	a provider that forgives a retry: one fault, no loss  TestPromiseProviderThatAllowsARetryLosesNoGrant
//	a strict one: loss from answer to journal, and said   TestPromiseStrictProviderLosesOnlyBetweenItsAnswerAndTheJournal
//	after a failover: what is stale is seen, never used   TestPromiseStaleVersionAfterAFailoverIsDetectedAndNeverUsed
//
// # Roles that change at the provider
//
// They show at every refresh, and between refreshes by the recheck: each broker
// looks at the grants of users with a running server on its host, twice a minute
// each, spread. A role that is taken away is refused RecheckWithin (60 s) and
// confirmLease (250 ms) later at the worst, as long as the provider answers, and
// four looks at a time and its rate keep up; one that is given works as soon,
// without a login. It is so where the provider shows the roles of now by a refresh
// token that it does not spend: Keycloak does, by introspection; or by a management
// API that is configured (roles_api). Elsewhere they show at refreshes only: so a
// grant of such a user that was not refreshed for some four minutes, by each grant's
// own point in time, is, and the worst case is SpendingWithin (5 min), confirmLease,
// and what the provider takes. Where a refresh would end the access token that is in
// use (refresh_ends_access) there is none for this, and the worst case is the life of
// an access token.
//
// The sources in broker/rolewatch say sooner whom to look at (LookNow, LookAtAll).
// They are hints: what follows is what the provider says when it is asked.
//
// A provider that can't be asked changes nothing. If three subjects or more, and
// all that a broker has seen in one round, have lost their last role, it raises
// an alarm and waits for the refreshes to say so. Which roles went and came is in
// the audit, action roles.
//
// # Groups and sharing that change at the hub
//
// The hub says them at the start of a server and at each refresh of its user
// (SetGroups, SetShared; five minutes, as it comes). From its word on a lost group
// is refused by every broker within confirmLease, and a server that somebody else
// may open gets no token from the next answer on, but by a rule with Shared. An open
// Watch is told at once. What a rule does besides when a role is lost it does when a
// group is; not when a server is shared, which its user undoes himself.
//
// # What is kept, and where
//
//	where                key → value                             until                          wrong if
//	memory, servers      server → registration, workload         Unregister; the workload ends  it outlives its socket
//	memory, views        hub, user → linked grants, groups       the revision moves; 30 s       it is used without its revision
//	memory, tokens       grant, audience, scopes → access token  expiry; another epoch          it is used without the grant's epoch;
//	                     apart: the hub's own, the whole grant's                                 the hub's own is a container's
//	memory, rolewatch    id of an event → it was followed        the next whole poll, of a minute  it hides another event
//	memory, pulse        revision and time of the store          250 ms; a note of a move       the host's clock is used instead
//	disk, journal        grant → counters, roles, sealed Grant   the store has it for sure      two processes write it
//	memory, neighbours   container → what it could forge by      something happens to it        it ran before the first bind and is not in it
//	memory, execs        container, command in it → it was told of  it has ended               its number alone, which an image can set, silences an event
//	memory, audit        kind of refusal, look or docker exec → how many  1 min; docker exec: 1 h  a token is among them
//	memory, metrics      what the parts say of themselves        10 s                           a decision rests on it
//	disk, audit-head     the audit's last line                 the next line                  two brokers write it
//	memory, Peer         connection → workload it attested as    the workload is another        it is kept past its connection
//	store, grant         hub, provider, sub → Grant              for ever                       it opens at another key
//	store, handle        fingerprint → grant or pending login    400 days; pending: 10 minutes  a tombstone leaves it good
//	store, link          hub, user → subject per provider,       for ever                       another subject inherits it;
//	                     groups at the hub, hosts of servers                                    they change without the revision
//	store, registration  hub, host, user, server → Registration  Unregister                     another host acts on it
//	store, token, hub, whole  as memory                               expiry                         as memory
//	store, issued        hub, provider, sub → what was handed out  expiry of the last             a token leaves that is not in it
//	store, stops         users of whose servers some are to be stopped  none is registered         it is believed without the rules
//	store, revocations   grants of which something is to be revoked  nothing is to be            it is believed without the records
//	store, logout        provider, token's id → it was followed  the token is too old anyway    it is kept before it was followed
//	store, broker        host → the keys its broker has           for ever                       a key is retired that it needs
//	store, revision      one number                              for ever                       it ever falls
package broker
