package broker_test

import (
	"testing"

	"tokenbroker/broker/brokertest"
)

func TestMain(m *testing.M) { brokertest.Main(m) }
