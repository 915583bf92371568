package peersocket

var (
	ParseStart = parseStart
	StartTime  = startTime
)
