package integration

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// Backend is a legacy web application: it reads plaintext message XML and answers plaintext message XML, and knows
// nothing of encryption, tickets or tokens.
type Backend struct {
	// Answer makes the answer to a message. Default: Echo.
	Answer http.HandlerFunc
	// Observe, when set, is told of each request before it is answered.
	Observe func(Received)

	server   *http.Server
	listener net.Listener

	mu       sync.Mutex
	received []Received
}

// Received is a request as the backend got it.
type Received struct {
	Method, URI string
	Header      http.Header
	Body        []byte
	Length      int64
}

// Start listens on addr, a loopback address.
func (b *Backend) Start(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	b.listener = l
	b.server = &http.Server{Handler: b, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = b.server.Serve(l) }() // ends with Close
	return nil
}

// Addr is where the backend listens.
func (b *Backend) Addr() string { return b.listener.Addr().String() }

// Close ends the backend.
func (b *Backend) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := b.server.Shutdown(ctx); err != nil {
		_ = b.server.Close()
	}
}

// Received lists what the backend got, oldest first.
func (b *Backend) Received() []Received {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Received(nil), b.received...)
}

// ServeHTTP implements http.Handler.
func (b *Backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, "body", http.StatusBadRequest)
		return
	}
	got := Received{Method: r.Method, URI: r.RequestURI, Header: r.Header.Clone(), Body: body, Length: r.ContentLength}
	b.mu.Lock()
	b.received = append(b.received, got)
	b.mu.Unlock()
	if b.Observe != nil {
		b.Observe(got)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if b.Answer != nil {
		b.Answer(w, r)
		return
	}
	Echo(w, r)
}

// Echo answers a text with 收到：and the text, any other message with success, and calls its XML text/html, as old servlets
// do. Whoever comes with a browser, as from a login, is told where that is.
func Echo(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = fmt.Fprintln(w, "the web application, at", r.RequestURI)
		return
	}
	var m struct {
		ToUserName, FromUserName, MsgType, Content string
	}
	w.Header().Set("Content-Type", "text/html")
	if err := xml.NewDecoder(r.Body).Decode(&m); err != nil {
		http.Error(w, "not XML", http.StatusBadRequest)
		return
	}
	if m.MsgType != "text" {
		_, _ = io.WriteString(w, "success")
		return
	}
	_, _ = fmt.Fprintf(w, "<xml><ToUserName><![CDATA[%s]]></ToUserName><FromUserName><![CDATA[%s]]></FromUserName>"+
		"<CreateTime>%d</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[收到：%s]]></Content></xml>",
		m.FromUserName, m.ToUserName, time.Now().Unix(), m.Content)
}
