package caddymodule

import (
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestFeedKeepsAllOfAnEntry: whatever its texts are and however long, an entry comes out of every place as it went in.
func TestFeedKeepsAllOfAnEntry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testFeedKeepsAllOfAnEntry) // where the two clocks that a time is made of are never read apart
}

func testFeedKeepsAllOfAnEntry(t *testing.T) {
	f := newFeed()
	at := time.Now().Add(-time.Minute)
	for length := range 2 * maxFeedText {
		e := Entry{
			Time: at, Kind: feedCall, AppID: accountID, Platform: platformID, Client: "crm", What: "/cgi-bin/x", Outcome: outcomeRefused,
			Status: 502, ErrCode: -1, RID: "rid", Reason: strings.Repeat("因", length/3) + strings.Repeat(".", length%3),
			took: time.Duration(length) * time.Millisecond, known: true, wechats: length%2 == 0, stranger: length%5 == 0,
		}
		f.add(&e)
		want := e.shown()
		entries, _, _ := f.after(e.Seq-1, "", 1)
		refused := f.refused(1, func(*Entry) bool { return true })
		_, _, last := f.of(accountID)
		if len(entries) != 1 || len(refused) != 1 || last == nil {
			t.Fatalf("%d bytes: %d entries, %d refusals, last %v", length, len(entries), len(refused), last)
		}
		for place, got := range map[string]Entry{"of all": entries[0], "of refusals": refused[0], "of the account": *last} {
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%d bytes, %s:\n%+v, want\n%+v", length, place, got, want)
			}
		}
	}
	// What comes after a long one in the same place is not taken for it.
	for range 2 * feedEntries {
		f.add(&Entry{Kind: feedCall, AppID: accountID, Outcome: outcomeRefused, Reason: "short", known: true})
	}
	for _, e := range append(f.all.newest(), f.bad.newest()...) {
		if e.Reason != "short" {
			t.Fatalf("kept too long: %+v", e)
		}
	}
	if _, _, last := f.of(accountID); last.Reason != "short" {
		t.Errorf("of the account: %+v", last)
	}
}

// TestFeedIsNotForTheCollector: the places of entries have no pointers, in which the collector would look each time.
func TestFeedIsNotForTheCollector(t *testing.T) {
	t.Parallel()
	var pointers func(t reflect.Type) bool
	pointers = func(t reflect.Type) bool {
		switch t.Kind() {
		case reflect.Struct:
			for i := range t.NumField() {
				if pointers(t.Field(i).Type) {
					return true
				}
			}
			return false
		case reflect.Array:
			return pointers(t.Elem())
		case reflect.Pointer, reflect.String, reflect.Slice, reflect.Map, reflect.Chan, reflect.Func, reflect.Interface, reflect.UnsafePointer:
			return true
		}
		return false
	}
	if pointers(reflect.TypeFor[feedSlot]()) {
		t.Error("feedSlot has a pointer")
	}
	if !pointers(reflect.TypeFor[Entry]()) {
		t.Error("and Entry has none")
	}
}
