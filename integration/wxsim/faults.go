package wxsim

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"time"
)

// Faults is the hostility of the simulator. Rates are between 0 and 1; a zero rate is the
// default named in its comment (or no such fault, with Polite), a negative one is never.
type Faults struct {
	// Polite makes every zero rate mean never.
	Polite bool

	DuplicatePushes float64 // a message that was answered is pushed once more: 0.15
	RepeatedTickets float64 // a ticket is pushed twice: 0.25
	StaleTickets    float64 // the ticket before comes again after the new one: 0.25
	SameNonce       float64 // a retry keeps timestamp, nonce and ciphertext of the first attempt: 0.3
	ShuffledQuery   float64 // parameters of a push in another order: 0.7
	ExtraQuery      float64 // an unknown parameter more: 0.3
	StrayBytes      float64 // BOM or white space around the envelope, line breaks between elements: 0.3
	NoCDATA         float64 // XML values escaped instead of in CDATA: 0.3
	StringNumbers   float64 // expires_in, and MsgId in JSON, as a string: 0.15

	// LostAnswers: an app's call is carried out, then its connection is dropped or a proxy's
	// 502 page is sent: 0.02.
	LostAnswers float64
	// LostTokenAnswers is the same for calls that hand out tokens or use up a code. What is
	// lost there is lost for the caller: never, unless set.
	LostTokenAnswers float64
	// EarlyDeath: an access token is refused with 40001 after a few calls, long before its
	// expires_in: 0.05.
	EarlyDeath float64
	// ComponentExpired: an expired component token is refused with 42006, not 42001: 0.5.
	ComponentExpired float64
	// SlowAnswers: an answer takes SlowBy (default 200 ms) longer: 0.03.
	SlowAnswers float64
	SlowBy      time.Duration

	// NewestTicketOnly refuses every ticket but the newest (61006); otherwise any live one does.
	NewestTicketOnly bool
	// RotateRefreshTokens changes the authorizer_refresh_token with each api_authorizer_token;
	// WeChat does so rarely. The old one works for Lives.RefreshOverlap more.
	RotateRefreshTokens bool
	// ReusableAuthCodes lets an authorization code be exchanged again; otherwise 61009.
	ReusableAuthCodes bool
}

const slowBy = 200 * time.Millisecond

func (f Faults) withDefaults() Faults {
	for _, r := range []struct {
		p   *float64
		def float64
	}{
		{&f.DuplicatePushes, 0.15}, {&f.RepeatedTickets, 0.25}, {&f.StaleTickets, 0.25}, {&f.SameNonce, 0.3},
		{&f.ShuffledQuery, 0.7}, {&f.ExtraQuery, 0.3}, {&f.StrayBytes, 0.3}, {&f.NoCDATA, 0.3}, {&f.StringNumbers, 0.15},
		{&f.LostAnswers, 0.02}, {&f.LostTokenAnswers, 0}, {&f.EarlyDeath, 0.05},
		{&f.ComponentExpired, 0.5}, {&f.SlowAnswers, 0.03},
	} {
		if *r.p == 0 && !f.Polite {
			*r.p = r.def
		}
	}
	if f.SlowBy <= 0 {
		f.SlowBy = slowBy
	}
	return f
}

// Fault is one prepared failure of an API call, see [Server.FailNext]. The fields add up:
// a delay, then one of errcode, half an answer, a dropped connection, or status and body.
type Fault struct {
	Delay          time.Duration // before anything else
	Act            bool          // carry the call out first: the answer is lost, not the call
	Errcode        int64         // answer with WeChat's error body for this code
	Errmsg         string        // default: WeChat's text for Errcode; a rid is appended
	Half           bool          // send half of the true answer, then drop the connection
	DropConnection bool          // no answer at all
	Status         int           // default 200 with a Body; with neither, the true answer after the delay
	ContentType    string        // of Body; default text/html
	Body           string
	Times          int // how often; default once, negative: until ClearFaults
}

// AnyPath as path of [Server.FailNext] fits every API path.
const AnyPath = "*"

// FailNext makes the next call of path (such as "/cgi-bin/user/info") fail. Several faults for
// one path are used up in order, one per call, whatever the call would have been answered.
func (s *Server) FailNext(path string, f Fault) {
	if f.Times == 0 {
		f.Times = 1
	}
	s.faultMu.Lock()
	defer s.faultMu.Unlock()
	s.prepared[path] = append(s.prepared[path], &f)
}

// ClearFaults forgets all faults that [Server.FailNext] prepared.
func (s *Server) ClearFaults() {
	s.faultMu.Lock()
	defer s.faultMu.Unlock()
	clear(s.prepared)
}

// takeFault returns a copy of the next prepared fault for path.
func (s *Server) takeFault(path string) (Fault, bool) {
	s.faultMu.Lock()
	defer s.faultMu.Unlock()
	for _, p := range []string{path, AnyPath} {
		queue := s.prepared[p]
		if len(queue) == 0 {
			continue
		}
		f := queue[0]
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.prepared[p] = queue[1:]
			}
		}
		return *f, true
	}
	return Fault{}, false
}

// dice decides by seed, site, name and the number of earlier throws for the two. Calls for
// different names may interleave as they like without changing each other's outcome.
type dice struct {
	seed   uint64
	mu     sync.Mutex
	thrown map[[2]string]uint64
}

func newDice(seed uint64) *dice {
	return &dice{seed: seed, thrown: map[[2]string]uint64{}}
}

// throw returns a generator for the next decision of site about name.
func (d *dice) throw(site, name string) *rand.Rand {
	d.mu.Lock()
	n := d.thrown[[2]string{site, name}]
	d.thrown[[2]string{site, name}] = n + 1
	d.mu.Unlock()
	h := fnv.New64a()
	_, _ = h.Write([]byte(site + "\x00" + name + "\x00"))
	_, _ = h.Write(binary.BigEndian.AppendUint64(nil, n))
	return rand.New(rand.NewPCG(d.seed, h.Sum64())) //nolint:gosec // repeatable on purpose
}

// hit reports whether a fault of this rate strikes now.
func (d *dice) hit(rate float64, site, name string) bool {
	return rate > 0 && d.throw(site, name).Float64() < rate
}
