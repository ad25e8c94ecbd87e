package wxsim

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// vectors are the parts of the official test vectors that the simulator's own crypto has.
type vectors struct {
	Keys []struct {
		Key string `json:"encoding_aes_key"`
		IV  string `json:"iv_hex"`
	} `json:"encoding_aes_keys"`
	Messages []struct {
		ID           string
		Token        string
		Key          string `json:"encoding_aes_key"`
		ReceiveID    string `json:"receive_id"`
		AppID        string `json:"appid"`
		Timestamp    string
		Nonce        string
		Encrypt      string
		MsgSignature string `json:"msg_signature"`
		Random16     string
		RandomHex    string `json:"random16_hex"`
		Plaintext    string
	} `json:"message_crypto"`
	Sorted []struct {
		ID       string
		Inputs   json.RawMessage
		Expected string
	} `json:"sorted_sha1"`
	JSSDK []struct {
		ID        string
		Ticket    string `json:"jsapi_ticket"`
		Nonce     string `json:"noncestr"`
		Timestamp any
		URL       string
		Signature string
	} `json:"jssdk_and_card"`
}

func loadVectors(t *testing.T) vectors {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "crypto", "testdata", "vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVectorsOfMessages(t *testing.T) {
	t.Parallel()
	all := loadVectors(t).Messages
	if len(all) < 20 {
		t.Fatalf("%d vectors, want at least 20", len(all))
	}
	for _, v := range all {
		t.Run(v.ID, func(t *testing.T) {
			t.Parallel()
			id := v.ReceiveID
			if id == "" {
				id = v.AppID
			}
			c, err := NewCrypt(v.Token, v.Key, id)
			if err != nil {
				t.Fatal(err)
			}
			message, err := c.Open(v.Encrypt)
			if err != nil {
				t.Fatal(err)
			}
			if string(message) != v.Plaintext {
				t.Errorf("opened %q, want %q", message, v.Plaintext)
			}
			if got := c.Sign(v.Timestamp, v.Nonce, v.Encrypt); v.MsgSignature != "" && got != v.MsgSignature {
				t.Errorf("msg_signature %s, want %s", got, v.MsgSignature)
			}
			if len(v.Random16) == 16 {
				sealed, err := c.SealWith([16]byte([]byte(v.Random16)), []byte(v.Plaintext))
				if err != nil || sealed != v.Encrypt {
					t.Errorf("sealed %s (%v), want %s", sealed, err, v.Encrypt)
				}
			}
		})
	}
}

func TestVectorsOfSignatures(t *testing.T) {
	t.Parallel()
	v := loadVectors(t)
	for _, s := range v.Sorted {
		var list []string
		if json.Unmarshal(s.Inputs, &list) != nil {
			var named map[string]string
			if err := json.Unmarshal(s.Inputs, &named); err != nil {
				t.Fatalf("%s: %v", s.ID, err)
			}
			for _, value := range named {
				list = append(list, value)
			}
		}
		if got := signSorted(list...); got != s.Expected {
			t.Errorf("%s: %s, want %s", s.ID, got, s.Expected)
		}
	}
	for _, s := range v.JSSDK {
		if s.Ticket == "" {
			continue
		}
		raw, _ := json.Marshal(s.Timestamp)
		if got := jsSignature(s.Ticket, s.Nonce, strings.Trim(string(raw), `"`), s.URL+"#top"); got != s.Signature {
			t.Errorf("%s: %s, want %s", s.ID, got, s.Signature)
		}
	}
}

func TestCryptRefuses(t *testing.T) {
	t.Parallel()
	c, err := NewCrypt("token", testKey, "wxright")
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewCrypt("token", testKey, "wxother")
	if err != nil {
		t.Fatal(err)
	}
	good, err := c.Seal([]byte("<xml></xml>"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := func(plain []byte) string {
		t.Helper()
		sealed, err := c.SealBlocks(plain)
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	padded := func(pad byte) []byte {
		b := make([]byte, 64)
		b[63] = pad
		return b
	}
	long := append(make([]byte, 16), 0xff, 0xff, 0xff, 0xff)
	for range 44 {
		long = append(long, 44)
	}
	foreign, err := other.Seal([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, encrypt := range map[string]string{
		"empty":            "",
		"not base64":       "!!!!",
		"url-safe base64":  strings.NewReplacer("+", "-", "/", "_").Replace(good) + "-_==",
		"line break":       good[:20] + "\n" + good[20:],
		"truncated":        good[:len(good)-24] + "==",
		"half block":       blocks(make([]byte, 16)),
		"padding 0":        blocks(padded(0)),
		"padding 33":       blocks(padded(33)),
		"uneven padding":   blocks(padded(5)),
		"length too long":  blocks(append(long[:60], 4, 4, 4, 4)),
		"other receive id": foreign,
	} {
		if _, err := c.Open(encrypt); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	if _, err := NewCrypt("t", testKey[:42], "wx"); err == nil {
		t.Error("a key of 42 characters was taken")
	}
	if _, err := NewCrypt("t", strings.Repeat("!", 43), "wx"); err == nil {
		t.Error("a key with a wrong alphabet was taken")
	}
}
