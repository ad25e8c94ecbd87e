// Package integration runs the gateway as its users do: the built binary as a process, over real sockets, against the
// simulator of WeChat in package wxsim. The tests of this folder and the demonstration behind `make run` use it;
// nothing else imports it.
package integration
