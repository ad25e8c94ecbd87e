package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// errNoApp is the answer where there is no gateway to ask.
var errNoApp = caddy.APIError{HTTPStatus: http.StatusNotFound, Err: errors.New("the configuration has no global option wechat")}

// verifyFile is a verification file as the admin endpoint shows it.
type verifyFile struct {
	Name     string     `json:"name"`
	Size     int        `json:"size"`
	AddedAt  *time.Time `json:"added_at,omitempty"`
	Platform string     `json:"platform,omitempty"` // whose web-view domain it is for; it came from WeChat
	Warning  string     `json:"warning,omitempty"`
}

func newVerifyFile(f tokens.VerifyFile) verifyFile {
	shown := verifyFile{Name: f.Name, Size: len(f.Content)}
	if !f.AddedAt.IsZero() {
		at := f.AddedAt.UTC()
		shown.AddedAt = &at
	}
	if doubt := doubtOf(f.Content); doubt != "" {
		shown.Warning = "WeChat will not accept it: it " + doubt
	}
	return shown
}

// verifyFiles lists the files that were added at run time, and those that WeChat gave for the platforms.
func (o *operations) verifyFiles(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	files, err := o.app.manager().VerifyFiles(r.Context())
	if err != nil {
		return o.storeFailed("verification files cannot be listed", err)
	}
	list := make([]verifyFile, 0, len(files))
	for _, f := range files {
		list = append(list, newVerifyFile(f))
	}
	auto := []verifyFile{}
	given := o.app.manager().ConfirmFiles()
	for _, p := range o.app.Platforms {
		if f, ok := given[p.AppID]; ok {
			shown := newVerifyFile(f)
			shown.Platform = p.AppID
			auto = append(auto, shown)
		}
	}
	return answerJSON(w, http.StatusOK, map[string]any{"files": list, "auto": auto})
}

// addVerifyFile adds a file, or replaces one.
func (o *operations) addVerifyFile(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	name := r.PathValue("name")
	if !tokens.IsVerifyFileName(name) {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: fmt.Errorf("'%s' is not the name of a verification file: want one like MP_verify_a1B2c3D4e5F6g7H8.txt or 87PweoaRBw.txt", name)}
	}
	content, err := io.ReadAll(http.MaxBytesReader(w, r.Body, tokens.MaxVerifyContent))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return caddy.APIError{HTTPStatus: http.StatusRequestEntityTooLarge, Err: fmt.Errorf("larger than %d bytes: that is no verification file; download it from WeChat's console again", tokens.MaxVerifyContent)}
	}
	if err != nil || endedEarly(int64(len(content)), r.ContentLength) {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New("the body broke off")}
	}
	f := newVerifyFile(tokens.VerifyFile{Name: name, Content: content})
	if isPage(content) {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: errors.New(f.Warning)}
	}
	added, err := o.app.manager().PutVerifyFile(r.Context(), name, content)
	switch {
	case errors.Is(err, tokens.ErrVerifyFile):
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: err}
	case errors.Is(err, tokens.ErrVerifyFull):
		return caddy.APIError{HTTPStatus: http.StatusConflict, Err: err}
	case err != nil:
		return o.storeFailed("a verification file cannot be kept", err)
	}
	o.logger.Info("verification file added", zap.String("file", name), zap.Int("size", len(content)), zap.Bool("replaced", !added))
	status := http.StatusOK
	if added {
		status = http.StatusCreated
	}
	return answerJSON(w, status, f)
}

// deleteVerifyFile removes a file that was added at run time.
func (o *operations) deleteVerifyFile(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	name := r.PathValue("name")
	found, err := o.app.manager().DeleteVerifyFile(r.Context(), name)
	switch {
	case err != nil:
		return o.storeFailed("a verification file cannot be removed", err)
	case !found:
		return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: fmt.Errorf("no file '%s' was added at run time", name)}
	}
	o.logger.Info("verification file removed", zap.String("file", name))
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// storeFailed tells the log why, and the caller where to look.
func (o *operations) storeFailed(what string, err error) error {
	o.logger.Error(what, zap.Error(err))
	return caddy.APIError{HTTPStatus: http.StatusServiceUnavailable, Err: errors.New(what + ": the log says why")}
}

// answerJSON answers with what is true now.
func answerJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body)
	return nil
}
