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

// The scripts of records have KEYS: folder, and lock under one; ARGV: channel, message, the fence of the writer's lock or ”, field.
var (
	storeScript = redis.NewScript(fenced + `
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)

	// Then ARGV, if the record must be what it was: that.
	deleteScript = redis.NewScript(fenced + `
if ARGV[5] and redis.call('HGET', KEYS[1], ARGV[4]) ~= ARGV[5] then return 0 end
if redis.call('HDEL', KEYS[1], ARGV[4]) == 1 then redis.call('PUBLISH', ARGV[1], ARGV[2]) end
return 1`)

	// Then ARGV: next value, whether there is an old one, old value.
	swapScript = redis.NewScript(`
local held = redis.call('HGET', KEYS[1], ARGV[4])
if held == ARGV[5] then return 1 end` + fenced + `
if ARGV[6] == '1' then
  if held ~= ARGV[7] then return 0 end
elseif held then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)
)

// KEYS: one that is neither read nor written, which has the script run where such keys are; ARGV: channel, message.
var proveScript = redis.NewScript(`
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1`)

// fenced refuses a write under a lock that another had since.
const fenced = `
if ARGV[3] ~= '' and string.match(redis.call('GET', KEYS[2]) or '', '^%d+') ~= ARGV[3] then return -1 end`

// The scripts of locks have KEYS: lock; ARGV: owner, lease and how long the fence is remembered in milliseconds.
//
// All that is known of a lock is one value: its fence, the end of its lease in milliseconds, and its owner; of one that was given
// back the lease is 0. Two keys a Cluster refuses while it is moving them, and while it is moving their slot and they are not there yet.
//
// A fence is the time in microseconds, or one more than the last: numbers that grow, also when the server was emptied or
// another one took over.
//
// A lease that ends later than one that begins now is of before the clock was put back, or of a server with another clock. Its owner may be
// dead, and so it becomes one that begins now.
var (
	lockScript = redis.NewScript(lockHead + `
local fence = now[1] * 1000000 + now[2]
if held then
  if not last then return false end
  if tonumber(till) > ms then
    if owner == ARGV[1] then return last end
    if tonumber(till) > ms + ARGV[2] then
      redis.call('SET', KEYS[1], last .. ' ' .. lease .. owner, 'PX', ARGV[3])
    end
    return false
  end
  if fence <= tonumber(last) then fence = last + 1 end
end
fence = string.format('%.0f', fence)
redis.call('SET', KEYS[1], fence .. ' ' .. lease .. ARGV[1], 'PX', ARGV[3])
return fence`)

	// Then ARGV: fence. A lock that is gone is taken again if nobody has had it since.
	renewScript = redis.NewScript(lockHead + `
if held and last ~= ARGV[4] then return 0 end
redis.call('SET', KEYS[1], ARGV[4] .. ' ' .. lease .. ARGV[1], 'PX', ARGV[3])
return 1`)

	// KEYS: lock; ARGV: owner.
	unlockScript = redis.NewScript(`#!lua flags=allow-oom
local last, owner = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) %d+ (.*)$')
if owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], last .. ' 0 ', 'KEEPTTL')
return 1`)
)

const lockHead = `#!lua flags=allow-oom
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local lease = string.format('%.0f ', ms + ARGV[2])
local held = redis.call('GET', KEYS[1])
local last, till, owner
if held then last, till, owner = string.match(held, '^(%d+) (%d+) (.*)$') end`

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
