package tokens

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

var errDisk = errors.New("disk full")

func failAll(op, name string) error { return errDisk }

func failWrites(op, name string) error {
	if op == "store" || op == "lock" || op == "delete" {
		return errDisk
	}
	return nil
}

func TestTicketNewestWins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		now := time.Now()
		put := func(value string, at time.Time) {
			t.Helper()
			if err := r.PutTicket(t.Context(), testPlatform, Ticket{secret.New(value), at}); err != nil {
				t.Fatalf("PutTicket: %v", err)
			}
		}
		want := func(value string) {
			t.Helper()
			got, err := r.Ticket(t.Context(), testPlatform)
			if err != nil || got.Value.Reveal() != value {
				t.Errorf("Ticket = %q, %v; want %q", got.Value.Reveal(), err, value)
			}
		}
		put("ticket@@@2", now.Add(-10*time.Minute))
		put("ticket@@@1", now.Add(-20*time.Minute)) // out of order
		want("ticket@@@2")
		put("ticket@@@3", now)
		synctest.Wait() // what else a ticket sets off is written by now
		writes := r.store.count("store")
		put("ticket@@@3", now) // twice
		if n := r.store.count("store") - writes; n != 0 {
			t.Errorf("%d writes for a ticket that came twice", n)
		}
		want("ticket@@@3")
		put("ticket@@@3b", now) // another one of the same second, from the other event URL
		want("ticket@@@3b")
		r.restart()
		put("ticket@@@1", now.Add(-20*time.Minute)) // nothing in memory, a newer one in the store
		want("ticket@@@3b")
		time.Sleep(ticketLife - time.Second)
		want("ticket@@@3b")
		time.Sleep(time.Second)
		if _, err := r.Ticket(t.Context(), testPlatform); !errors.Is(err, ErrNoTicket) {
			t.Errorf("after twelve hours: %v, want ErrNoTicket", err)
		}
	})
}

func TestTicketSurvivesACrash(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		// What is acknowledged is in the store: another process, beside this one, reads it.
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		if _, err := other.Ticket(t.Context(), testPlatform); err != nil {
			t.Errorf("Ticket in another process: %v", err)
		}
		if _, err := other.Get(t.Context(), ComponentKey(testPlatform)); err != nil {
			t.Errorf("Get in another process: %v", err)
		}
		r.get(t, ComponentKey(testPlatform))
		if n := r.wx.count(pathComponentToken); n != 1 {
			t.Errorf("two processes made %d component tokens", n)
		}
	})
}

func TestTicketOfAnotherNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		time.Sleep(10 * time.Minute)
		if err := other.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@new"), time.Now()}); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Ticket(t.Context(), testPlatform); err != nil || got.Value.Reveal() != "ticket@@@new" {
			t.Errorf("Ticket = %q, %v", got.Value.Reveal(), err)
		}
	})
}

func TestTicketServesFromMemoryWhileTheStoreFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		r.store.fail(failAll)
		ticket := Ticket{secret.New("ticket@@@mem"), time.Now()}
		for range 2 { // WeChat pushes again what was not acknowledged
			if err := r.PutTicket(t.Context(), testPlatform, ticket); !errors.Is(err, ErrStore) {
				t.Errorf("PutTicket: %v, want ErrStore", err)
			}
		}
		if r.Unsaved() != 1 {
			t.Errorf("Unsaved = %d", r.Unsaved())
		}
		r.get(t, ComponentKey(testPlatform))
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		if r.Unsaved() != 0 {
			t.Errorf("Unsaved = %d after the store recovered", r.Unsaved())
		}
		r.restart()
		if _, err := r.Ticket(t.Context(), testPlatform); err != nil {
			t.Errorf("after a restart: %v", err)
		}
	})
}

func TestTicketOfARemovedPlatformIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		r.store.fail(failAll)
		_ = r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@mem"), time.Now()})
		next := *r.env
		next.Platforms = nil
		r.Use(&next)
		time.Sleep(2 * time.Minute)
		if r.Unsaved() != 0 {
			t.Error("an unconfigured platform keeps the gateway unready")
		}
	})
}

func TestHangingStoreDoesNotHoldAPushLongerThanItMay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.store.hold(func(string, string) { time.Sleep(2500 * time.Millisecond) })
		start := time.Now()
		_ = r.PutTicket(t.Context(), testPlatform, Ticket{secret.New("ticket@@@slow"), time.Now()})
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("PutTicket took %v", took)
		}
	})
}

func TestTicketThatIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.Use(r.env)
		if err := r.PutTicket(t.Context(), testPlatform, Ticket{}); err == nil {
			t.Error("an empty ticket was accepted")
		}
		if err := r.PutTicket(t.Context(), "wxunknown", Ticket{Value: secret.New("x")}); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("another's ticket: %v", err)
		}
		r.wx.set(func(f *fakeWeChat) { f.tickets = map[string]bool{"ticket@@@good": true} })
		k := ComponentKey(testPlatform)
		_ = r.PutTicket(t.Context(), testPlatform, Ticket{Value: secret.New("ticket@@@bad")})
		if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNoTicket) || !hasCode(err, 61006) {
			t.Errorf("Get: %v, want ErrNoTicket and WeChat's 61006", err)
		}
		synctest.Wait()
		for range 3 { // a ticket that WeChat does not take is none
			if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNoTicket) {
				t.Errorf("Get: %v, want ErrNoTicket", err)
			}
		}
		if n := r.wx.count(pathComponentToken); n != 1 {
			t.Errorf("a refused ticket was tried %d times", n)
		}
		// A good one is used at once.
		_ = r.PutTicket(t.Context(), testPlatform, Ticket{Value: secret.New("ticket@@@good")})
		r.get(t, k)
	})
}

func TestWeChatIsAskedForATicketPolitely(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.Use(r.env)
		synctest.Wait()
		if n := r.wx.count(pathStartPush); n != 1 {
			t.Errorf("asked %d times at the first Use without a ticket", n)
		}
		for range 29 * 6 { // 29 minutes of callers and reloads
			if _, err := r.Get(t.Context(), ComponentKey(testPlatform)); !errors.Is(err, ErrNoTicket) {
				t.Fatalf("Get: %v, want ErrNoTicket", err)
			}
			r.Use(r.env)
			time.Sleep(10 * time.Second)
		}
		if n := r.wx.count(pathStartPush); n != 3 {
			t.Errorf("asked %d times in 29 minutes, want every ten", n)
		}
		for range 6 { // an hour
			r.ticket(t, testPlatform)
			time.Sleep(10 * time.Minute)
		}
		if n := r.wx.count(pathStartPush); n > 3 {
			t.Errorf("asked although there is a ticket: %d times", n)
		}
		r.get(t, ComponentKey(testPlatform))
		if r.wx.count(pathComponentToken) != 1 {
			t.Error("WeChat was asked for a token without a ticket")
		}
	})
}

func TestNoTicketIsAskedForWhenOneIsStored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		synctest.Wait()
		before := r.wx.count(pathStartPush)
		r.restart()
		time.Sleep(24 * time.Minute)
		if n := r.wx.count(pathStartPush) - before; n != 0 {
			t.Errorf("asked %d times", n)
		}
	})
}

// Pushes that stop are noticed, also when they stopped before a restart, and WeChat is asked to begin again.
func TestOverdueTicket(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		r.Use(r.env)
		r.ticket(t, testPlatform)
		synctest.Wait()
		came := r.TicketReceived(testPlatform)
		if came.IsZero() || time.Since(came) > time.Second {
			t.Errorf("received at %v", came)
		}
		asked := func() int { return r.wx.count(pathStartPush) }
		before := asked()
		time.Sleep(24 * time.Minute)
		if n := asked() - before; n != 0 {
			t.Errorf("asked %d times before the ticket was overdue", n)
		}
		time.Sleep(2 * time.Minute)
		if n := asked() - before; n != 1 || r.log.count("overdue") != 1 {
			t.Errorf("asked %d times, said %d times", n, r.log.count("overdue"))
		}
		// A restart asks neither sooner nor more often.
		r.restart()
		time.Sleep(5 * time.Minute)
		if n := asked() - before; n != 1 {
			t.Errorf("asked %d times after a restart", n)
		}
		time.Sleep(25 * time.Minute)
		if n := asked() - before; n != 4 {
			t.Errorf("asked %d times in half an hour, want every ten minutes", n)
		}
		// The old ticket still works, and a new push ends it.
		r.get(t, ComponentKey(testPlatform))
		r.ticket(t, testPlatform)
		time.Sleep(20 * time.Minute)
		if n := asked() - before; n != 4 {
			t.Errorf("asked %d times although a ticket came", n)
		}
	})
}

// newRigWithTicketAhead is a rig of one platform whose ticket came while the clock was years ahead, a minute after it began.
func newRigWithTicketAhead(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.env.Platforms = r.env.Platforms[:1]
	ahead := ticketWire{Ticket: "ticket@@@ahead", CreatedAt: time.Now().Unix(), ReceivedAt: time.Now().AddDate(3, 0, 0).Unix()}
	if err := r.storeRecord(t.Context(), r.env.prepared(), ticketName(testPlatform), ahead); err != nil {
		t.Fatal(err)
	}
	r.Use(r.env)
	time.Sleep(time.Minute)
	return r
}

// So they are if a ticket came while the clock was ahead, be it by years: it was kept before the machine had asked for the time.
func TestOverdueTicketAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRigWithTicketAhead(t)
		r.ticket(t, testPlatform) // the last one
		before := r.wx.count(pathStartPush)
		time.Sleep(2 * ticketOverdue)
		if n := r.wx.count(pathStartPush) - before; n == 0 || r.log.count("overdue") == 0 {
			t.Errorf("asked %d times, said %d times", n, r.log.count("overdue"))
		}
	})
}

// Nor do they have to come once more for that.
func TestNoTicketAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRigWithTicketAhead(t)
		if n := r.wx.count(pathStartPush); n > 0 {
			t.Errorf("asked %d times although there is a ticket", n)
		}
		if age := time.Since(r.TicketReceived(testPlatform)); age < 0 || age > time.Minute {
			t.Errorf("the ticket is %v old", age)
		}
		time.Sleep(2 * ticketOverdue)
		if n := r.wx.count(pathStartPush); n == 0 || r.log.count("overdue") == 0 {
			t.Errorf("asked %d times, said %d times", n, r.log.count("overdue"))
		}
		time.Sleep(ticketLife)
		if _, err := r.Ticket(t.Context(), testPlatform); !errors.Is(err, ErrNoTicket) {
			t.Errorf("the ticket of a day before: %v", err)
		}
	})
}

func TestTicketsEndAndAreAskedForAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		time.Sleep(13 * time.Hour)
		before := r.wx.count(pathStartPush)
		if _, err := r.Get(t.Context(), ComponentKey(testPlatform)); !errors.Is(err, ErrNoTicket) {
			t.Errorf("Get: %v, want ErrNoTicket", err)
		}
		time.Sleep(pushInterval)
		if n := r.wx.count(pathStartPush) - before; n != 2 { // one for each platform
			t.Errorf("asked %d times", n)
		}
	})
}

// A gateway that starts before its network does not wait ten minutes to ask for a ticket.
func TestNetworkThatComesLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Platforms = r.env.Platforms[:1]
		var up atomic.Bool
		r.wx.hook = func(string, map[string]any) (string, error) {
			if !up.Load() {
				return "", errors.New("no route to host")
			}
			return "", nil
		}
		r.Use(r.env)
		time.Sleep(20 * time.Second)
		up.Store(true)
		n := r.wx.count(pathStartPush)
		time.Sleep(2 * time.Minute)
		if r.wx.count(pathStartPush) == n {
			t.Error("not asked within two minutes of the network's return")
		}
	})
}
