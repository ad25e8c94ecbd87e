//go:build !unix

package offheap

import "errors"

var mapMemory = func(int) ([]byte, error) { return nil, errors.ErrUnsupported }

func unmapMemory([]byte) {}
