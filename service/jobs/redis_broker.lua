-- The commands of the Redis broker. Redis runs each one atomically.
--
-- ARGV is the command, the prefix of every key, and the arguments of the command. The keys:
--   waiting:KIND           sorted set of what waits to be received, scored by the time of enqueueing in microseconds;
--                          for a kind of job it is the whole queue
--   ready:KIND, retry:KIND streams of the calls that wait or are leased; `retry` is delivered before `ready`
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

local function enqueue_job(kind, id, queued_at)
  if redis.call('ZADD', key('waiting', kind), 'NX', queued_at, id) == 1 then wake_receivers() end
end

local function enqueue_call(queue, kind, channel, payload, request, failed_deliveries)
  if redis.call('ZADD', key('waiting', kind), 'NX', now(), channel) == 1 then
    redis.call('XADD', key(queue, kind), '*',
      'id', channel, 'payload', payload, 'request', request, 'failed_deliveries', failed_deliveries)
    wake_receivers()
  end
end

local function remove(stream, entry)
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

local function read(stream, consumer, limit)
  local function read_new()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', limit, 'STREAMS', stream, '>')
  end
  local reply = read_new()
  if reply and reply.err then -- the group starts at 0, so that calls sent before the first worker are delivered
    redis.call('XGROUP', 'CREATE', stream, GROUP, 0, 'MKSTREAM')
    reply = read_new()
  end
  return reply and reply[1][2] or {}
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
  local kind, id = ARGV[3], ARGV[4]
  enqueue_job(kind, id, now())
end

function commands.put_back() -- a job that was received and not claimed waits again, in its old place
  local kind, id, queued_at = ARGV[3], ARGV[4], ARGV[5]
  enqueue_job(kind, id, queued_at)
end

function commands.send_call() -- idempotent: no effect while the call waits or is leased, or after it has ended
  local kind, channel, payload, request = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  if redis.call('EXISTS', key('owner', channel)) == 0 and not last_event(channel).last then
    enqueue_call('ready', kind, channel, payload, request, 0)
  end
end

function commands.receive() -- idempotent for one sequence number of a consumer
  local consumer, sequence, ttl, limit = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
  local earlier_reply = redis.call('HGET', key('last_reply', consumer), sequence)
  if earlier_reply then return cjson.decode(earlier_reply) end
  local calls, jobs = {}, {}

  local function receive_calls(queue, kind)
    local stream = key(queue, kind)
    while #calls < limit and redis.call('ZCARD', key('waiting', kind)) > 0 do
      local entries = read(stream, consumer, limit - #calls)
      if #entries == 0 then return end
      for _, entry in ipairs(entries) do
        local call, token = fields(entry), sequence .. '.' .. #calls
        local newest = last_event(call.id)
        redis.call('ZREM', key('waiting', kind), call.id)
        if newest.last then -- a worker that had lost the lease has answered it
          remove(stream, entry[1])
          redis.call('DEL', key('owner', call.id))
        else
          redis.call('SET', key('owner', call.id), token)
          calls[#calls + 1] = {stream, entry[1], token, kind, call.id, call.payload, call.request,
            call.failed_deliveries, newest.publisher or ''}
        end
      end
    end
  end

  for i = 7, #ARGV, 2 do
    local kind, is_call = ARGV[i], ARGV[i + 1] == '1'
    if is_call then
      receive_calls('retry', kind)
      receive_calls('ready', kind)
    else
      local popped = redis.call('ZPOPMIN', key('waiting', kind), limit)
      for n = 1, #popped, 2 do jobs[#jobs + 1] = {kind, popped[n], popped[n + 1]} end
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
  local owner = redis.call('GET', key('owner', channel))
  if not is_pending(consumer, stream, entry) and (since == epoch() or owner) then return end
  remove(stream, entry)
  redis.call('SET', key('owner', channel), '')
  enqueue_call('retry', kind, channel, payload, request, failed_deliveries)
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
  local queue, kind, cursor = ARGV[3], ARGV[4], ARGV[5]
  local lease, max_deliveries, error = ARGV[6], tonumber(ARGV[7]), ARGV[8]
  local stream, dead_letters = key(queue, kind), {}
  local page = redis.pcall('XAUTOCLAIM', stream, GROUP, 'reclaimer', lease, cursor, 'COUNT', 100)
  if page.err then return {'0-0', dead_letters} end -- no group: nothing was ever received
  for _, entry in ipairs(page[2]) do
    if entry and entry[2] then
      local call = fields(entry)
      local failed_deliveries = call.failed_deliveries + 1
      remove(stream, entry[1])
      if failed_deliveries < max_deliveries then
        redis.call('SET', key('owner', call.id), '')
        enqueue_call('retry', kind, call.id, call.payload, call.request, failed_deliveries)
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

function commands.oldest_age() -- in microseconds
  local oldest = redis.call('ZRANGE', key('waiting', ARGV[3]), 0, 0, 'WITHSCORES')
  return oldest[2] and now() - oldest[2] or 0
end

return commands[command]()
