package caddymodule

import (
	"strings"
	"time"
)

// record is an entry without a pointer in it. The feed has some thousands of entries for as long as the process lives, and the collector
// would look into each of them in every cycle, of which a busy gateway has one in some hundred pushes.
type record struct {
	recordHead
	text [recordText]byte // as much of it as is used
}

type recordHead struct {
	seq      uint64        // 0: there is no entry
	at, took time.Duration // at: after the feed's epoch
	errcode  int64
	status   int32
	flags    uint8
	used     uint8                    // of the text
	lengths  [len(entryTexts{})]uint8 // of the texts in it
}

// recordText is how many bytes of text a record has room for: of what goes well it has all.
const recordText = 180

// What a record's flags say.
const (
	recordKnown = 1 << iota
	recordStranger
	recordWechats
)

// entryTexts are an entry's texts.
type entryTexts [8]*string

func (e *Entry) texts() entryTexts {
	return entryTexts{&e.Kind, &e.AppID, &e.Platform, &e.Client, &e.What, &e.Outcome, &e.RID, &e.Reason}
}

// pack makes r the record of an entry. If there is no room for it, the entry is to be kept beside, whole.
func (r *record) pack(e *Entry, epoch time.Time) (whole *Entry) {
	r.seq, r.at, r.took, r.errcode, r.status, r.flags = e.Seq, e.Time.Sub(epoch), e.took, e.ErrCode, int32(e.Status), 0
	if e.known {
		r.flags |= recordKnown
	}
	if e.stranger {
		r.flags |= recordStranger
	}
	if e.wechats {
		r.flags |= recordWechats
	}
	r.used = 0
	for i, text := range e.texts() {
		n := copy(r.text[r.used:], *text)
		if n < len(*text) {
			copied := *e
			copied.AppID = strings.Clone(e.AppID)
			return &copied
		}
		r.lengths[i] = uint8(n)
		r.used += uint8(n)
	}
	return nil
}

// set makes r a copy.
func (r *record) set(of *record) {
	r.recordHead = of.recordHead
	copy(r.text[:], of.text[:of.used])
}

// entry is the entry that pack made it of, or one without a seq.
func (r *record) entry(epoch time.Time, whole *Entry) Entry {
	switch {
	case r.seq == 0:
		return Entry{}
	case whole != nil:
		return *whole
	}
	e := Entry{
		Seq: r.seq, Time: epoch.Add(r.at), took: r.took, ErrCode: r.errcode, Status: int(r.status),
		known: r.flags&recordKnown != 0, stranger: r.flags&recordStranger != 0, wechats: r.flags&recordWechats != 0,
	}
	text := string(r.text[:r.used]) // one for all
	for i, into := range e.texts() {
		n := int(r.lengths[i])
		*into, text = text[:n], text[n:]
	}
	return e
}
