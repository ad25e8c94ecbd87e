package http1

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// sender sends a request's body while its answer is waited for, and read. The connection is kept if both are done.
type sender struct {
	e       *exchange
	o       outgoing // a copy: RoundTrip's has ended when an answer came early
	proceed chan bool
	done    chan struct{}
	bodyErr error // of the request's body, before done
	lost    error // with which the backend took no more, before done

	mu     sync.Mutex
	sent   bool // all of it
	answer bool // complete
	timer  *time.Timer
}

func (o *outgoing) startSender(e *exchange) *sender {
	s := &sender{e: e, o: *o, done: make(chan struct{})}
	o.shut, o.touched = true, true // the body is the sender's
	if o.expect {
		s.proceed = make(chan bool, 1)
	}
	go s.run()
	return s
}

// goOn tells a sender that waits for 100 Continue whether to send; the first word counts.
func (s *sender) goOn(yes bool) {
	select {
	case s.proceed <- yes:
	default:
	}
}

// stop ends a sender whose connection has been closed.
func (s *sender) stop() {
	if s.proceed != nil {
		s.goOn(false)
	}
}

func (s *sender) run() {
	defer close(s.done)
	err := s.send()
	closeBody(s.o.req)
	if err == nil {
		s.e.watch()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = err == nil
	switch {
	case s.answer, err == nil:
	case s.bodyErr != nil:
		s.e.conn.close()
	case errors.Is(err, errKeptBack):
	default:
		// The backend takes no more. It may have answered before it closed.
		s.lost = err
		s.timer = time.AfterFunc(sendGrace, s.e.conn.close)
	}
}

// cause is why the sender, which is done, has had the connection closed: nil if it has not.
func (s *sender) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil && !s.timer.Stop() {
		return &writeError{s.lost}
	}
	return s.bodyErr
}

// isDone reports whether nothing more is sent.
func (s *sender) isDone() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// settle is called before anybody hears that the answer is complete, and reports whether the connection is still open. A sender that is not
// done then gets a moment, if the connection may be used again: most often it is, but for saying so. After that it sends no more, for who has
// the answer may use the body's memory for something else; it is only waited for until it has left that alone, not for more of the body.
func (s *sender) settle(last bool) bool {
	if s.isDone() {
		return true
	}
	timer := time.NewTimer(sendGrace)
	defer timer.Stop()
	if !last {
		select {
		case <-s.done:
			return true
		case <-timer.C:
		}
	}
	s.e.conn.close()
	timer.Reset(closedGrace)
	select {
	case <-s.done:
	case <-timer.C:
	}
	return false
}

// answered is called, once, when the answer was read to its end and the sender is settled, or will not be read. A sender that goes on has no
// connection any more; what it still reads of the body goes nowhere.
func (s *sender) answered(clean bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = true
	if s.timer != nil && !s.timer.Stop() || !s.sent {
		clean = false
	}
	s.e.client.release(s.e.conn, clean)
}

// pieces are parts of bodies.
var pieces = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

var errKeptBack = errors.New("the body was not asked for")

// send sends the body.
func (s *sender) send() error {
	if s.proceed != nil {
		timer := time.NewTimer(s.e.client.ContinueTimeout)
		defer timer.Stop()
		select {
		case yes := <-s.proceed:
			if !yes {
				return errKeptBack
			}
		case <-timer.C:
		}
	}
	buf := pieces.Get().(*[]byte)
	defer pieces.Put(buf)
	if s.o.length >= 0 {
		return s.sendCounted(*buf)
	}
	return s.sendChunked(*buf)
}

// sendCounted sends a body of known length.
func (s *sender) sendCounted(buf []byte) error {
	r := s.o.reader()
	left := s.o.length
	for {
		n, err := r.Read(buf)
		if int64(n) > left {
			s.bodyErr = fmt.Errorf("the request's body is longer than its length of %d", s.o.length)
			return s.bodyErr
		}
		left -= int64(n)
		if n > 0 {
			if _, werr := s.e.conn.nc.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF && left > 0:
			s.bodyErr = fmt.Errorf("the request's body has %d bytes where its length is %d", s.o.length-left, s.o.length)
			return s.bodyErr
		case err == io.EOF:
			return nil
		case err != nil:
			s.bodyErr = err
			return err
		}
	}
}

// sizeRoom is in front of a chunk's data for its size.
const sizeRoom = len("ffffffff\r\n")

// sendChunked sends a body of unknown length, each read as a chunk, and the trailer.
func (s *sender) sendChunked(buf []byte) error {
	r := s.o.reader()
	for {
		n, err := r.Read(buf[sizeRoom : len(buf)-2])
		if n > 0 {
			size := strconv.AppendUint(buf[:0:sizeRoom], uint64(n), 16)
			size = append(size, '\r', '\n')
			start := sizeRoom - len(size)
			copy(buf[start:], size)
			end := sizeRoom + n
			buf[end], buf[end+1] = '\r', '\n'
			if _, werr := s.e.conn.nc.Write(buf[start : end+2]); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF:
			return s.sendTrailer(buf[:0])
		case err != nil:
			s.bodyErr = err
			return err
		}
	}
}

// sendTrailer ends a chunked body. The trailer's values are known only now.
func (s *sender) sendTrailer(b []byte) error {
	b = append(b, "0\r\n"...)
	for name, values := range s.o.req.Trailer {
		if err := checkTrailer(name, values); err != nil {
			s.bodyErr = err
			return err
		}
		for _, v := range values {
			b = append(b, http.CanonicalHeaderKey(name)...)
			b = append(b, ':', ' ')
			b = append(b, trimOWS(v)...)
			b = append(b, '\r', '\n')
		}
	}
	b = append(b, '\r', '\n')
	_, err := s.e.conn.nc.Write(b)
	return err
}
