package redisstore

import "github.com/redis/go-redis/v9"

// What a script that changes a record returns.
const (
	swapped  = 0 // 1: done
	lockLost = -1
)

// Each script may run twice with the same arguments, when an answer got lost, and then says what it said the first time.
//
// Those of locks and of Take begin with a line that lets them run in a Redis that is full: a lock is what keeps two nodes
// from refreshing one token, it is small, and it ends by itself.

// The scripts of records have KEYS: folder, and fence under a lock; ARGV: channel, message, the fence of the writer's lock or ”, field.
var (
	storeScript = redis.NewScript(`
if ARGV[3] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[3] then return -1 end
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)

	deleteScript = redis.NewScript(`
if ARGV[3] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[3] then return -1 end
if redis.call('HDEL', KEYS[1], ARGV[4]) == 1 then redis.call('PUBLISH', ARGV[1], ARGV[2]) end
return 1`)

	// Then ARGV: next value, whether there is an old one, old value.
	swapScript = redis.NewScript(`
local held = redis.call('HGET', KEYS[1], ARGV[4])
if held == ARGV[5] then return 1 end
if ARGV[3] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[3] then return -1 end
if ARGV[6] == '1' then
  if held ~= ARGV[7] then return 0 end
elseif held then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)
)

// The scripts of locks have KEYS: lock, fence; ARGV: owner, lease and life of the fence in milliseconds.
//
// A fence is the time in microseconds, or one more than the last: numbers that grow, also when the server was emptied or
// another one took over.
var (
	lockScript = redis.NewScript(`#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then return redis.call('GET', KEYS[2]) end
if owner then return false end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local now = redis.call('TIME')
local fence = now[1] * 1000000 + now[2]
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if fence <= last then fence = last + 1 end
fence = string.format('%.0f', fence)
redis.call('SET', KEYS[2], fence, 'PX', ARGV[3])
return fence`)

	// Then ARGV: fence. A lock that is gone is taken again if nobody has had it since.
	renewScript = redis.NewScript(`#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
local fence = redis.call('GET', KEYS[2])
if fence and fence ~= ARGV[4] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[3])
return 1`)

	unlockScript = redis.NewScript(`
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0`)
)

// The values of Ephemeral begin with the token, of tokenLength bytes, of the call that kept them.
var (
	// KEYS: value; ARGV: token, value, ttl in milliseconds.
	claimScript = redis.NewScript(`
local held = redis.call('GET', KEYS[1])
if not held then
  redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
  return {1, ARGV[2]}
end
local first = 0
if string.sub(held, 1, #ARGV[1]) == ARGV[1] then first = 1 end
return {first, string.sub(held, #ARGV[1] + 1)}`)

	// KEYS: value, what was taken; ARGV: token, for how long the latter is remembered in milliseconds.
	takeScript = redis.NewScript(`#!lua flags=allow-oom
local held = redis.call('GET', KEYS[1])
if held then
  local value = string.sub(held, #ARGV[1] + 1)
  redis.call('SET', KEYS[2], ARGV[1] .. value, 'PX', ARGV[2])
  redis.call('DEL', KEYS[1])
  return value
end
local taken = redis.call('GET', KEYS[2])
if taken and string.sub(taken, 1, #ARGV[1]) == ARGV[1] then return string.sub(taken, #ARGV[1] + 1) end
return false`)
)

// Claims are plain values, made by SET.
var (
	// KEYS: claim.
	peekClaimScript = redis.NewScript(`
local held = redis.call('GET', KEYS[1])
if not held then return false end
return {held, redis.call('PTTL', KEYS[1])}`)

	// KEYS: claim; ARGV: old value, next value, its time in milliseconds or 0. Where an answer got lost and the script runs
	// again it says no, although it was the one that did it: two callers may want the same change, once each. Who needs to
	// know has a mark in the value.
	swapClaimScript = redis.NewScript(`#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then
  redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
else
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end
return 1`)

	// KEYS: node; ARGV: for how long, in milliseconds.
	beatScript = redis.NewScript(`#!lua flags=allow-oom
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
return 1`)
)
