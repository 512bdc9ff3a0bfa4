-- The commands of the Redis broker. Redis runs each one atomically.
--
-- ARGV is the command, the prefix of every key, and the arguments of the command. The keys:
--   queue:KIND             sorted set of what waits to be received, as 'CALLER ID', scored by its position in a queue that
--                          is fair between callers (service/kit/fair_queue.py)
--   enqueued:KIND          sorted set of the ids that wait, scored by the time of enqueueing in microseconds
--   ends:KIND              hash from a caller to the position at which its newest item ends
--   virtual_time:KIND      the position of the item that was received last
--   call:CALL              hash with the fields of a call that waits
--   leased:KIND            stream of the calls that are leased
--   owner:CALL             the token that may publish on the call's channel; "" while the call waits again
--   last_reply:CONSUMER    the last non-empty reply to `receive`, sent again when the consumer did not get it
--   events:CHANNEL         stream of a channel's events
--   cancel:CHANNEL         present while the channel is cancelled
--   wakeup                 stream with one entry, replaced to wake every blocked receiver
--   last_explicit_wakeup   the last wakeup entry that the command `wake` wrote
--   clock                  the last id of an event
--   epoch                  the time since which this Redis has not lost its data
--   shutdown:CONSUMER      stream that ends the listeners of a closing broker; only `redis_broker.py` uses it

local command, prefix = ARGV[1], ARGV[2]
local GROUP = 'workers'
local MAX_EVENTS, OPEN_TTL_SECONDS, ENDED_TTL_SECONDS = 4096, 3600, 300
local PAGE = 100 -- items of a queue that are read at once

local function key(name, of) return prefix .. ':' .. name .. (of and ':' .. of or '') end

local function now() -- in microseconds
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function epoch()
  redis.call('SET', key('epoch'), now(), 'NX')
  return redis.call('GET', key('epoch'))
end

local function fields(entry)
  local by_name = {}
  for i = 1, #entry[2], 2 do by_name[entry[2][i]] = entry[2][i + 1] end
  return by_name
end

-- deliveries

local function wake_receivers() return redis.call('XADD', key('wakeup'), 'MAXLEN', 1, '*', 'wakeup', '') end

local function last_wakeup()
  local newest = redis.call('XREVRANGE', key('wakeup'), '+', '-', 'COUNT', 1)[1]
  return newest and newest[1] or '0-0'
end

local function enqueue(kind, caller, id, position) -- returns whether it did not wait yet
  if redis.call('ZADD', key('enqueued', kind), 'NX', now(), id) == 0 then return false end
  redis.call('ZADD', key('queue', kind), position, caller .. ' ' .. id)
  wake_receivers()
  return true
end

local function virtual_time(kind) return tonumber(redis.call('GET', key('virtual_time', kind))) or 0 end

local function new_position(kind, caller, cost)
  local last_end = tonumber(redis.call('HGET', key('ends', kind), caller)) or 0
  local position = math.max(virtual_time(kind), last_end)
  return position, position + cost
end

local function enqueue_new(kind, caller, id, cost)
  local position, position_of_end = new_position(kind, caller, cost)
  if not enqueue(kind, caller, id, position) then return false end
  redis.call('HSET', key('ends', kind), caller, string.format('%.17g', position_of_end))
  return true
end

local function enqueue_again(kind, caller, id, position) -- in its old place, also when Redis has lost its data since
  return enqueue(kind, caller, id, math.min(tonumber(position), virtual_time(kind)))
end

local function store_call(channel, caller, cost, payload, request, failed_deliveries)
  redis.call('HSET', key('call', channel), 'caller', caller, 'cost', cost,
    'payload', payload, 'request', request, 'failed_deliveries', failed_deliveries)
end

-- Removes up to `limit` items of callers that are admitted, in order; returns {id, caller, position}.
local function dequeue(kind, limit, excluded, only)
  local queue, received, start = key('queue', kind), {}, 0
  local is_excluded = {}
  for _, caller in ipairs(excluded) do is_excluded[caller] = true end
  while #received < limit do
    local page = redis.call('ZRANGE', queue, start, start + PAGE - 1, 'WITHSCORES')
    if #page == 0 then break end
    for i = 1, #page, 2 do
      local caller, id = string.match(page[i], '^(.*) (%S+)$')
      if #received < limit and not is_excluded[caller] and (not only or only == caller) then
        received[#received + 1] = {id, caller, page[i + 1], page[i]}
      end
    end
    start = start + PAGE
  end
  for _, item in ipairs(received) do
    redis.call('ZREM', queue, item[4])
    redis.call('ZREM', key('enqueued', kind), item[1])
    if tonumber(item[3]) > virtual_time(kind) then redis.call('SET', key('virtual_time', kind), item[3]) end
  end
  if redis.call('EXISTS', queue) == 0 then redis.call('DEL', key('ends', kind), key('virtual_time', kind)) end
  return received
end

local function remove(stream, entry)
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

-- Adds a call to the stream of the leased ones, as an entry that this consumer holds; returns its id.
local function lease_entry(kind, consumer, channel, call)
  local stream = key('leased', kind)
  redis.pcall('XGROUP', 'CREATE', stream, GROUP, 0, 'MKSTREAM')
  local entry = redis.call('XADD', stream, '*', 'id', channel, 'payload', call.payload, 'request', call.request,
    'failed_deliveries', call.failed_deliveries, 'caller', call.caller, 'position', call.position, 'cost', call.cost)
  redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
  return stream, entry
end

local function is_pending(consumer, stream, entry)
  local pending = redis.pcall('XPENDING', stream, GROUP, entry, entry, 1, consumer)
  return not pending.err and #pending > 0
end

-- events

local function last_event(channel)
  local newest = redis.call('XREVRANGE', key('events', channel), '+', '-', 'COUNT', 1)[1]
  return newest and fields(newest) or {}
end

local function append_event(channel, publisher, number, name, data, last)
  local events = key('events', channel)
  local id = math.max(now(), (tonumber(redis.call('GET', key('clock'))) or 0) + 1)
  redis.call('SET', key('clock'), id)
  local event = {'name', name, 'data', data, 'publisher', publisher, 'number', number}
  if last then
    event[9], event[10] = 'last', '1'
    redis.call('DEL', key('cancel', channel))
  end
  redis.call('XADD', events, 'MAXLEN', '~', MAX_EVENTS, string.format('%.0f-0', id), unpack(event))
  redis.call('EXPIRE', events, last and ENDED_TTL_SECONDS or OPEN_TTL_SECONDS)
end

-- commands

local commands = {}

function commands.notify() -- idempotent: a job waits at most once
  local kind, id, caller, cost = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  enqueue_new(kind, caller, id, cost)
end

function commands.put_back() -- a job that was received and not claimed waits again, in its old place
  local kind, id, caller, position = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  enqueue_again(kind, caller, id, position)
end

function commands.send_call() -- idempotent: no effect while the call waits or is leased, or after it has ended
  local kind, channel, payload, request, caller, cost = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
  if redis.call('EXISTS', key('owner', channel)) == 0 and not last_event(channel).last
    and enqueue_new(kind, caller, channel, cost) then
    store_call(channel, caller, cost, payload, request, 0)
  end
end

function commands.receive() -- idempotent for one sequence number of a consumer
  local consumer, sequence, ttl, limit = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
  local only = ARGV[7] == '1' and ARGV[8] or nil
  local earlier_reply = redis.call('HGET', key('last_reply', consumer), sequence)
  if earlier_reply then return cjson.decode(earlier_reply) end
  local calls, jobs = {}, {}

  local function receive_call(kind, channel, caller, position)
    local call, newest = fields({'', redis.call('HGETALL', key('call', channel))}), last_event(channel)
    redis.call('DEL', key('call', channel))
    if newest.last then -- a worker that had lost the lease has answered it
      redis.call('DEL', key('owner', channel))
      return
    end
    call.position = position
    local token = sequence .. '.' .. #calls
    local stream, entry = lease_entry(kind, consumer, channel, call)
    redis.call('SET', key('owner', channel), token)
    calls[#calls + 1] = {stream, entry, token, kind, channel, call.payload, call.request,
      call.failed_deliveries, newest.publisher or '', caller, position, call.cost}
  end

  for _, request in ipairs(cjson.decode(ARGV[9])) do
    local kind, is_call, excluded = request[1], request[2], request[3]
    if is_call then
      repeat
        local received = dequeue(kind, limit - #calls, excluded, only)
        for _, item in ipairs(received) do receive_call(kind, item[1], item[2], item[3]) end
      until #received == 0 or #calls == limit
    else
      for _, item in ipairs(dequeue(kind, limit, excluded, only)) do
        jobs[#jobs + 1] = {kind, item[1], item[2], item[3]}
      end
    end
    if #calls + #jobs > 0 then break end
  end
  local reply = {calls, jobs, epoch(), last_wakeup(), redis.call('GET', key('last_explicit_wakeup')) or ''}
  if #calls + #jobs > 0 then
    redis.call('DEL', key('last_reply', consumer))
    redis.call('HSET', key('last_reply', consumer), sequence, cjson.encode(reply))
    redis.call('PEXPIRE', key('last_reply', consumer), ttl)
  end
  return reply
end

function commands.ack()
  local consumer, stream, entry, channel, token = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  if is_pending(consumer, stream, entry) then
    remove(stream, entry)
    if redis.call('GET', key('owner', channel)) == token then redis.call('DEL', key('owner', channel)) end
  end
end

function commands.nack() -- also for a call that Redis has lost, unless another consumer received it since
  local consumer, stream, entry, channel, since = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  local kind, payload, request, failed_deliveries = ARGV[8], ARGV[9], ARGV[10], ARGV[11]
  local caller, position, cost = ARGV[12], ARGV[13], ARGV[14]
  local owner = redis.call('GET', key('owner', channel))
  if not is_pending(consumer, stream, entry) and (since == epoch() or owner) then return end
  remove(stream, entry)
  redis.call('SET', key('owner', channel), '')
  if enqueue_again(kind, caller, channel, position) then
    store_call(channel, caller, cost, payload, request, failed_deliveries)
  end
end

function commands.renew() -- returns the indices of the leases that are lost
  local consumer, lost = ARGV[3], {}
  for i = 4, #ARGV, 5 do
    local stream, entry, since, channel, token = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
    local owner = redis.call('GET', key('owner', channel))
    if is_pending(consumer, stream, entry) then
      redis.call('XCLAIM', stream, GROUP, consumer, 0, entry, 'IDLE', 0, 'JUSTID')
    elseif since == epoch() or (owner and owner ~= token) then
      lost[#lost + 1] = (i - 4) / 5
    end
  end
  return lost
end

function commands.reclaim() -- requeues one page of expired leases; returns the next cursor and the dead letters
  local kind, cursor = ARGV[3], ARGV[4]
  local lease, max_deliveries, error = ARGV[5], tonumber(ARGV[6]), ARGV[7]
  local stream, dead_letters = key('leased', kind), {}
  local page = redis.pcall('XAUTOCLAIM', stream, GROUP, 'reclaimer', lease, cursor, 'COUNT', 100)
  if page.err then return {'0-0', dead_letters} end -- no group: nothing was ever received
  for _, entry in ipairs(page[2]) do
    if entry and entry[2] then
      local call = fields(entry)
      local failed_deliveries = call.failed_deliveries + 1
      remove(stream, entry[1])
      if failed_deliveries < max_deliveries then
        redis.call('SET', key('owner', call.id), '')
        if enqueue_again(kind, call.caller, call.id, call.position) then
          store_call(call.id, call.caller, call.cost, call.payload, call.request, failed_deliveries)
        end
      else
        redis.call('DEL', key('owner', call.id))
        if not last_event(call.id).last then
          append_event(call.id, '', 0, 'error', error, true)
          dead_letters[#dead_letters + 1] = {call.id, call.request}
        end
      end
    end
  end
  return {page[1], dead_letters}
end

function commands.prune() -- deletes consumers without leases: the one named, and those idle for too long
  local closing, max_idle = ARGV[3], tonumber(ARGV[4])
  for i = 5, #ARGV do
    local consumers = redis.pcall('XINFO', 'CONSUMERS', ARGV[i], GROUP)
    for _, info in ipairs(consumers.err and {} or consumers) do
      local consumer = fields({'', info})
      if consumer.pending == 0 and (consumer.name == closing or consumer.idle > max_idle) then
        redis.call('XGROUP', 'DELCONSUMER', ARGV[i], GROUP, consumer.name)
      end
    end
  end
end

function commands.publish() -- returns the channels whose token is not the owner's any more
  local fenced = {}
  for i = 3, #ARGV, 7 do
    local channel, token, publisher, number = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
    local owner, newest = redis.call('GET', key('owner', channel)), last_event(channel)
    local is_duplicate = publisher ~= '' and newest.publisher == publisher and tonumber(newest.number) >= number
    if token ~= '' and owner and owner ~= token then
      fenced[#fenced + 1] = channel
    elseif not (newest.last or is_duplicate) then
      append_event(channel, publisher, number, ARGV[i + 4], ARGV[i + 5], ARGV[i + 6] == '1')
    end
  end
  return fenced
end

function commands.cancel()
  local channel = ARGV[3]
  if not last_event(channel).last then redis.call('SET', key('cancel', channel), 1, 'EX', OPEN_TTL_SECONDS) end
end

function commands.wake() redis.call('SET', key('last_explicit_wakeup'), wake_receivers()) end

function commands.wake_receivers() wake_receivers() end

function commands.count_waiting() -- of one caller
  local kind, caller, count, start = ARGV[3], ARGV[4], 0, 0
  local page
  repeat
    page = redis.call('ZRANGE', key('queue', kind), start, start + PAGE - 1)
    for _, member in ipairs(page) do
      if string.match(member, '^(.*) %S+$') == caller then count = count + 1 end
    end
    start = start + PAGE
  until #page < PAGE
  return count
end

function commands.oldest_age() -- in microseconds
  local oldest = redis.call('ZRANGE', key('enqueued', ARGV[3]), 0, 0, 'WITHSCORES')
  return oldest[2] and now() - oldest[2] or 0
end

return commands[command]()
