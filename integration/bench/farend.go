package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits of a far end.
const (
	farBuffer   = 8 << 10
	longestBody = 1 << 20 // what is longer is an upload, and read in pieces
)

// ask is a request that came to a far end. Its fields are valid until it is answered.
type ask struct {
	path, query []byte
	appid       []byte // of X-Wechat-Appid
	http2       bool
	length      int
	body        []byte
	upload      io.Reader // in place of body, if it is longer than longestBody
}

// office answers what comes to a far end. Its answer is appended to dst; wrong says what was wrong with the request.
type office func(dst []byte, a *ask) (body []byte, wrong string)

// farEnd is a backend or WeChat: as lean as HTTP/1.1 can be, so that it costs the generator's processor little; over TLS it is
// Go's own server, for HTTP/2.
type farEnd struct {
	wrong    complaints
	office   office
	listener net.Listener
	server   *http.Server // with TLS

	mu    sync.Mutex
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

// startFarEnd has an office listen on loopback.
func startFarEnd(o office, cert *tls.Certificate) (*farEnd, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f := &farEnd{office: o, listener: l, conns: map[net.Conn]bool{}}
	if cert != nil {
		f.server = &http.Server{
			Handler: f, ReadHeaderTimeout: dialTimeout, ErrorLog: log.New(io.Discard, "", 0), // closed connections are no news
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12},
		}
		f.wg.Go(func() { _ = f.server.ServeTLS(l, "", "") })
		return f, nil
	}
	f.wg.Go(f.accept)
	return f, nil
}

// URL is the far end's origin.
func (f *farEnd) URL() string {
	if f.server != nil {
		return "https://" + f.listener.Addr().String()
	}
	return "http://" + f.listener.Addr().String()
}

// Close ends the far end and all its connections.
func (f *farEnd) Close() error {
	var err error
	if f.server != nil {
		err = f.server.Close()
	} else {
		err = f.listener.Close()
		f.mu.Lock()
		for c := range f.conns {
			_ = c.Close()
		}
		f.conns = nil
		f.mu.Unlock()
	}
	f.wg.Wait()
	return err
}

func (f *farEnd) accept() {
	for {
		c, err := f.listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				f.wrong.add("far end cannot accept: " + err.Error())
			}
			return
		}
		f.mu.Lock()
		if f.conns == nil {
			_ = c.Close()
		} else {
			f.conns[c] = true
			f.wg.Go(func() { f.serve(c) })
		}
		f.mu.Unlock()
	}
}

// serve answers what comes on a connection until the other side closes it.
func (f *farEnd) serve(c net.Conn) {
	defer func() {
		_ = c.Close()
		f.mu.Lock()
		delete(f.conns, c)
		f.mu.Unlock()
	}()
	r := bufio.NewReaderSize(c, farBuffer)
	var a ask
	var target, out, body []byte
	for {
		line, err := readLine(r)
		if err != nil {
			return // the other side is done with the connection
		}
		_, rest, ok := bytes.Cut(line, []byte(" "))
		uri, _, ok2 := bytes.Cut(rest, []byte(" "))
		if !ok || !ok2 {
			f.wrong.add("request line " + excerpt(line))
			return
		}
		target = append(target[:0], uri...)
		a.path, a.query, _ = bytes.Cut(target, []byte("?"))
		a.appid, a.upload = a.appid[:0], nil
		h, err := readHeader(r, func(name, value []byte) {
			if bytes.EqualFold(name, appidHeader) {
				a.appid = append(a.appid[:0], value...)
			}
		})
		if err != nil {
			f.complain("request header", err)
			return
		}
		a.length, a.body = max(h.length, 0), a.body[:0]
		if a.length > longestBody {
			a.upload = io.LimitReader(r, int64(a.length))
		} else if a.body, err = h.appendBody(a.body, r, longestBody); err != nil {
			f.complain("request body", err)
			return
		}
		body = f.answer(body[:0], &a)
		out = append(out[:0], "HTTP/1.1 200 OK\r\nContent-Type: "...)
		out = append(append(out, contentType(body)...), "\r\nContent-Length: "...)
		out = append(strconv.AppendInt(out, int64(len(body)), 10), "\r\n\r\n"...)
		if _, err := c.Write(append(out, body...)); err != nil {
			return // the client at the other end misses the answer, and says so
		}
	}
}

// complain notes what is no HTTP. That the other side is gone is not noted: a server that ends leaves requests behind, and
// else the client misses an answer.
func (f *farEnd) complain(what string, err error) {
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return
	}
	f.wrong.add(what + ": " + err.Error())
}

var appidHeader = []byte("X-Wechat-Appid")

func contentType(body []byte) string {
	if bytes.HasPrefix(body, []byte("{")) {
		return "application/json; encoding=utf-8"
	}
	return "text/xml"
}

// answer has the office answer, and notes what was wrong. The answer then says so, which is a wrong one at the other end too.
func (f *farEnd) answer(dst []byte, a *ask) []byte {
	out, wrong := f.office(dst, a)
	if wrong == "" {
		return out
	}
	f.wrong.add(wrong)
	return append(dst[:0], "far end: "+wrong...)
}

// ServeHTTP is serve over TLS.
func (f *farEnd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := ask{
		path: []byte(r.URL.Path), query: []byte(r.URL.RawQuery), appid: []byte(r.Header.Get(string(appidHeader))),
		http2: r.ProtoMajor == 2, length: int(max(r.ContentLength, 0)),
	}
	var err error
	if a.length > longestBody {
		a.upload = r.Body
	} else if a.body, err = io.ReadAll(io.LimitReader(r.Body, longestBody)); err != nil {
		return // the other side is gone
	}
	body := f.answer(nil, &a)
	w.Header().Set("Content-Type", contentType(body))
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

// parameter is a parameter of a query, as it is written.
func parameter(query []byte, name string) (value []byte, count int) {
	for rest := query; len(rest) > 0; {
		var pair []byte
		pair, rest, _ = bytes.Cut(rest, []byte("&"))
		if k, v, _ := bytes.Cut(pair, []byte("=")); string(k) == name {
			value = v
			count++
		}
	}
	return value, count
}

// backend answers pushes with 320 B of plaintext that name the push. With opened it wants plaintext, every byte of it, as
// behind the gateway; else the encrypted push, as behind stock Caddy.
func backend(opened bool) office {
	return func(dst []byte, a *ask) ([]byte, string) {
		nonce, _ := parameter(a.query, "nonce")
		id, ok := digits(nonce)
		switch {
		case !ok || len(nonce) != nonceDigits:
			return dst, "push has the nonce " + excerpt(nonce)
		case !opened && !bytes.Contains(a.body, []byte("<Encrypt>")):
			return dst, "push is not encrypted: " + excerpt(a.body)
		case opened:
			t, ok := messages[len(a.body)]
			stamp(a.body, templateTime)
			got, ok2 := t.id(a.body)
			if !ok || !ok2 {
				return dst, "push is not the plaintext that was encrypted: " + excerpt(a.body)
			}
			if got%pow10(nonceDigits) != id {
				return dst, "plaintext belongs to another push"
			}
			if string(a.appid) != appID {
				return dst, "push has the appid " + excerpt(a.appid)
			}
		}
		return reply.append(dst, id), ""
	}
}

// wechatAPI is WeChat's: it gives out a token, and answers calls that have it once. With bare it wants no token at all.
type wechatAPI struct {
	gives string
	wants string // "": no token may come
	http2 bool   // calls must come over HTTP/2
	files office // takes uploads; nil: there may be none
}

func (w wechatAPI) office(dst []byte, a *ask) ([]byte, string) {
	if string(a.path) == "/cgi-bin/stable_token" {
		return fmt.Appendf(dst, `{"access_token":%q,"expires_in":7200}`, w.gives), ""
	}
	token, count := parameter(a.query, "access_token")
	switch {
	case w.wants == "" && count > 0:
		return dst, "call has a token"
	case w.wants != "" && (count != 1 || string(token) != w.wants):
		return dst, fmt.Sprintf("call has %d tokens, or a wrong one", count)
	case w.http2 && !a.http2:
		return dst, "call came over HTTP/1.1"
	}
	if a.upload != nil && w.files != nil {
		return w.files(dst, a)
	}
	if a.length > 0 {
		return dst, "call has a body"
	}
	openid, _ := parameter(a.query, "openid")
	id, ok := digits(bytes.TrimPrefix(openid, []byte(openIDPrefix)))
	if !ok {
		return dst, "call is about " + excerpt(openid)
	}
	return answer.append(dst, id), ""
}

// newCertificate makes a certificate for loopback, and its PEM for those who are to trust it.
func newCertificate() (*tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "benchmark"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// fetch asks a server that is not under measurement, such as the admin endpoint.
func fetch(ctx context.Context, url string, timeout time.Duration, into io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("%s: %s: %s", url, resp.Status, strings.TrimSpace(string(text)))
	}
	_, err = io.Copy(into, resp.Body)
	return err
}
