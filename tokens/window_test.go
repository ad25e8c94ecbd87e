package tokens

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestWindowExpiry(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		ttl   time.Duration // given to Set; 0: the window's minute
		after time.Duration
		want  bool
	}{
		{"just before its end", 0, time.Minute - time.Nanosecond, true},
		{"just after its end", 0, time.Minute + time.Nanosecond, false},
		{"own shorter time", time.Second, time.Second + time.Nanosecond, false},
		{"own longer time", time.Hour, time.Hour - time.Nanosecond, true},
		{"negative time is the window's", -time.Second, time.Minute - time.Nanosecond, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWindow[string, int](time.Minute, 10)
				w.Set("k", 7, tt.ttl)
				time.Sleep(tt.after)
				got, found := w.Get("k")
				if found != tt.want || (found && got != 7) {
					t.Errorf("Get = %d, %v, want found %v", got, found, tt.want)
				}
				if live := w.Len() == 1; live != tt.want {
					t.Errorf("Len = %d", w.Len())
				}
			})
		})
	}
}

func TestWindowReadingDoesNotProlong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWindow[string, int](time.Minute, 10)
		w.Set("k", 1, 0)
		for range 5 {
			time.Sleep(11 * time.Second)
			if _, found := w.Get("k"); !found {
				t.Fatal("lost early")
			}
			w.GetOrSet("k", func() int { t.Error("made anew"); return 0 })
			w.Take("k", func(int) bool { return false })
		}
		time.Sleep(5*time.Second + time.Nanosecond)
		if _, found := w.Get("k"); found {
			t.Error("reading prolonged the value's life")
		}
	})
}

func TestWindowGetOrSetAfterExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWindow[string, int](time.Minute, 10)
		w.GetOrSet("k", func() int { return 1 })
		time.Sleep(time.Minute + 1)
		if v, found := w.GetOrSet("k", func() int { return 2 }); found || v != 2 {
			t.Errorf("GetOrSet = %d, %v, want the new value", v, found)
		}
		time.Sleep(time.Minute - 1)
		if v, found := w.Get("k"); !found || v != 2 {
			t.Errorf("Get = %d, %v, want the new value for its whole life", v, found)
		}
	})
}

func TestWindowBound(t *testing.T) {
	t.Parallel()
	w := NewWindow[int, int](time.Minute, 3)
	for i := range 3 {
		w.Set(i, i, 0)
	}
	w.Get(0) // 1 is now the one not looked at for longest
	w.Set(3, 3, 0)
	for key, want := range map[int]bool{0: true, 1: false, 2: true, 3: true} {
		if _, found := w.Get(key); found != want {
			t.Errorf("key %d found %v, want %v", key, found, want)
		}
	}
	if w.Len() != 3 {
		t.Errorf("Len = %d, want 3", w.Len())
	}
}

func TestWindowExpiredMakeRoomFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWindow[string, int](time.Hour, 2)
		w.Set("long", 1, 0)
		w.Set("short", 2, time.Second)
		time.Sleep(2 * time.Second)
		w.Set("new", 3, 0)
		if _, found := w.Get("long"); !found {
			t.Error("a live value was dropped while an expired one took up room")
		}
	})
}

// Only what is dropped before its time counts: neither what has expired, nor what is replaced or taken.
func TestWindowCountsWhatGoesEarly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWindow[int, string](time.Minute, 2)
		w.Set(1, "a", 0)
		w.Set(2, "b", time.Second)
		w.Set(2, "again", time.Second)
		time.Sleep(time.Second + 1)
		w.Set(3, "in place of the expired", 0)
		w.Take(3, nil)
		w.Set(4, "in place of the taken", 0)
		if got := w.Early(); got != 0 {
			t.Errorf("Early = %d, want 0", got)
		}
		w.Set(5, "in place of 1", 0)
		if _, found := w.Get(1); found || w.Early() != 1 {
			t.Errorf("found %v, Early = %d, want 1", found, w.Early())
		}
	})
}

func TestWindowLimitIsAtLeastOne(t *testing.T) {
	t.Parallel()
	w := NewWindow[int, int](time.Minute, -5) // ttlcache would take 0 as unbounded
	for i := range 10 {
		w.Set(i, i, 0)
	}
	if w.Len() != 1 {
		t.Errorf("Len = %d, want 1", w.Len())
	}
}

func TestWindowTake(t *testing.T) {
	t.Parallel()
	w := NewWindow[string, int](time.Minute, 10)
	w.Set("k", 7, 0)
	if v, taken := w.Take("k", func(v int) bool { return v != 7 }); taken || v != 0 {
		t.Errorf("Take of an unwanted value = %d, %v", v, taken)
	}
	if v, taken := w.Take("k", func(v int) bool { return v == 7 }); !taken || v != 7 {
		t.Errorf("Take = %d, %v", v, taken)
	}
	if _, taken := w.Take("k", nil); taken {
		t.Error("taken twice")
	}
	w.Set("d", 1, 0)
	w.Delete("d")
	if _, found := w.Get("d"); found {
		t.Error("deleted value found")
	}
}

func TestWindowClosed(t *testing.T) {
	t.Parallel()
	w := NewWindow[string, int](time.Minute, 10)
	w.Set("k", 1, 0)
	w.Close()
	w.Set("l", 2, 0)
	if v, found := w.GetOrSet("m", func() int { return 3 }); found || v != 3 {
		t.Errorf("GetOrSet after Close = %d, %v, want what was made", v, found)
	}
	w.Delete("k")
	w.Close()
	if w.Len() != 0 {
		t.Errorf("Len = %d after Close", w.Len())
	}
}

// One of many wins each race: two that both believed to be first would exchange a code twice.
func TestWindowIsAtomic(t *testing.T) {
	t.Parallel()
	const callers, rounds = 8, 200
	w := NewWindow[int, int](time.Minute, rounds)
	for round := range rounds {
		var first, takers atomic.Int32
		var wg sync.WaitGroup
		for caller := range callers {
			wg.Go(func() {
				v, found := w.GetOrSet(round, func() int { return caller })
				if !found {
					first.Add(1)
				}
				if _, taken := w.Take(round, func(now int) bool { return now == v }); taken {
					takers.Add(1)
				}
			})
		}
		wg.Wait()
		if first.Load() != takers.Load() || first.Load() < 1 {
			t.Fatalf("round %d: %d were first, %d took", round, first.Load(), takers.Load())
		}
	}
}
