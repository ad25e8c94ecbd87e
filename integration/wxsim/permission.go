package wxsim

import (
	"slices"
	"strings"
)

// The permission sets (权限集) of which one opens a path to a platform, by what the path begins with. Paths that are not
// here are open to every authorizer.
var pathSets = []struct {
	prefix string
	sets   []int
}{
	{"/cgi-bin/message/custom/", []int{1, 19}},
	{"/cgi-bin/message/template/", []int{7}},
	{"/cgi-bin/user/", []int{2}},
	{"/cgi-bin/qrcode/", []int{3}},
	{"/cgi-bin/ticket/", []int{webServiceSet}},
	{"/cgi-bin/menu/", []int{15}},
	{"/wxa/commit", []int{codeSet}},
	{"/wxa/submit_audit", []int{codeSet}},
	{"/wxa/get_auditstatus", []int{codeSet}},
	{"/wxa/release", []int{codeSet}},
	{"/wxa/undocodeaudit", []int{codeSet}},
	{"/wxa/revertcoderelease", []int{codeSet}},
	{"/wxa/getversioninfo", []int{codeSet}},
	{"/wxa/get_webviewdomain_confirmfile", []int{codeSet}},
}

// codeSet is the permission set of mini program development, which takes in the web-view domain.
const codeSet = 18

// codeNotGranted is the code for a path whose permission set the account has not granted to the platform.
const codeNotGranted = 61007

// lacksSet reports whether the call's path is closed to its token, which is that of a platform for an account that has
// not granted what it takes. The caller holds mu.
func (c *call) lacksSet() bool {
	if c.cred == nil || c.cred.kind != KindAuthorizer {
		return false
	}
	for _, p := range pathSets {
		if strings.HasPrefix(c.r.URL.Path, p.prefix) {
			granted := c.s.authorizations[pair{c.cred.platform, c.cred.appID}].sets
			return !slices.ContainsFunc(p.sets, func(id int) bool { return slices.Contains(granted, id) })
		}
	}
	return false
}
