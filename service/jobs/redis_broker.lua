-- The steps of the Redis broker, each of which happens whole or not at all.
--
-- ARGV is the step, the prefix of every key and the step's own arguments. The keys:
--   work:KIND, first:KIND  streams of what waits or is worked on; `first` is what came back, delivered before `work`
--   waiting:KIND           what waits, and since when: a job that is announced twice waits once
--   owner:CALL             which taking of a call may speak; "" while it waits again
--   taken:CONSUMER         what the last taking gave: an answer that was lost on its way is given again
--   out:CHANNEL, cancel:CHANNEL
--   bell, woken            a stream with one entry, rung whenever a `take` should look; the last ring that was a wake
--   clock                  the last id of an event
--   epoch                  since when this Redis has not lost its data

local step, prefix = ARGV[1], ARGV[2]
local GROUP = 'workers'
local KEPT_EVENTS, KEPT_SECONDS, ENDED_SECONDS = 4096, 3600, 300
local LOST_BELLS = 10 -- a job may die so many times as often as a call: its attempts are counted in SQL

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
  local found = {}
  for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
  return found
end

-- deliveries

local function ring() return redis.call('XADD', key('bell'), 'MAXLEN', 1, '*', 'rung', '') end

local function rung()
  local newest = redis.call('XREVRANGE', key('bell'), '+', '-', 'COUNT', 1)[1]
  return newest and newest[1] or '0-0'
end

local function queue(where, kind, id, payload, request, deaths)
  if redis.call('ZADD', key('waiting', kind), 'NX', now(), id) == 1 then
    redis.call('XADD', key(where, kind), '*',
      'id', id, 'payload', payload, 'request', request, 'deaths', deaths)
    ring()
  end
end

local function remove(stream, entry)
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

local function read(stream, consumer, limit)
  local function fresh()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', limit, 'STREAMS', stream, '>')
  end
  local reply = fresh()
  if reply and reply.err then -- from 0 on, or what was sent before the first worker came would be lost
    redis.call('XGROUP', 'CREATE', stream, GROUP, 0, 'MKSTREAM')
    reply = fresh()
  end
  return reply and reply[1][2] or {}
end

local function holds(consumer, stream, entry)
  local pending = redis.pcall('XPENDING', stream, GROUP, entry, entry, 1, consumer)
  return not pending.err and #pending > 0
end

-- news

local function ending(channel) -- what was said last
  local newest = redis.call('XREVRANGE', key('out', channel), '+', '-', 'COUNT', 1)[1]
  return newest and fields(newest) or {}
end

local function say(channel, by, number, name, data, last)
  local out = key('out', channel)
  local id = math.max(now(), (tonumber(redis.call('GET', key('clock'))) or 0) + 1)
  redis.call('SET', key('clock'), id)
  local event = {'name', name, 'data', data, 'by', by, 'number', number}
  if last then
    event[9], event[10] = 'last', '1'
    redis.call('DEL', key('cancel', channel))
  end
  redis.call('XADD', out, 'MAXLEN', '~', KEPT_EVENTS, string.format('%.0f-0', id), unpack(event))
  redis.call('EXPIRE', out, last and ENDED_SECONDS or KEPT_SECONDS)
end

-- steps

local steps = {}

function steps.announce()
  local kind, id = ARGV[3], ARGV[4]
  queue('work', kind, id, '', '', 0)
end

function steps.call() -- asked twice, it waits once
  local kind, channel, payload, request = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  if redis.call('EXISTS', key('owner', channel)) == 0 and not ending(channel).last then
    queue('work', kind, channel, payload, request, 0)
  end
end

function steps.take()
  local consumer, turn, lease, limit = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
  local given = redis.call('HGET', key('taken', consumer), turn)
  if given then return cjson.decode(given) end
  local taken = {}

  local function take(where, kind)
    local stream = key(where, kind)
    while #taken < limit and redis.call('ZCARD', key('waiting', kind)) > 0 do
      local entries = read(stream, consumer, limit - #taken)
      if #entries == 0 then return end
      for _, entry in ipairs(entries) do
        local work, hold = fields(entry), turn .. '.' .. #taken
        local is_call, newest = work.payload ~= '', ending(work.id)
        redis.call('ZREM', key('waiting', kind), work.id)
        if is_call and newest.last then -- answered already by one that lost it
          remove(stream, entry[1])
          redis.call('DEL', key('owner', work.id))
        else
          if is_call then redis.call('SET', key('owner', work.id), hold) end
          taken[#taken + 1] = {stream, entry[1], hold, kind, work.id, work.payload, work.request, work.deaths,
            newest.by or ''}
        end
      end
    end
  end

  for i = 7, #ARGV do
    take('first', ARGV[i])
    take('work', ARGV[i])
    if #taken > 0 then break end
  end
  local answer = {taken, epoch(), rung(), redis.call('GET', key('woken')) or ''}
  if #taken > 0 then
    redis.call('DEL', key('taken', consumer))
    redis.call('HSET', key('taken', consumer), turn, cjson.encode(answer))
    redis.call('PEXPIRE', key('taken', consumer), lease)
  end
  return answer
end

function steps.done()
  local consumer, stream, entry, channel, hold = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  if holds(consumer, stream, entry) then
    remove(stream, entry)
    if redis.call('GET', key('owner', channel)) == hold then redis.call('DEL', key('owner', channel)) end
  end
end

function steps.give_back() -- also what Redis has lost since, unless somebody else was given it
  local consumer, stream, entry, channel, hold, since = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
  local kind, payload, request, deaths = ARGV[9], ARGV[10], ARGV[11], ARGV[12]
  local owner = redis.call('GET', key('owner', channel))
  if not holds(consumer, stream, entry) and (since == epoch() or owner) then return end
  remove(stream, entry)
  if payload ~= '' then redis.call('SET', key('owner', channel), '') end
  queue('first', kind, channel, payload, request, deaths)
end

function steps.renew() -- returns the places in the list of those that somebody else has been given
  local consumer, lost = ARGV[3], {}
  for i = 4, #ARGV, 5 do
    local stream, entry, since, channel, hold = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
    local owner = redis.call('GET', key('owner', channel))
    if holds(consumer, stream, entry) then
      redis.call('XCLAIM', stream, GROUP, consumer, 0, entry, 'IDLE', 0, 'JUSTID')
    elseif since == epoch() or (owner and owner ~= hold) then
      lost[#lost + 1] = (i - 4) / 5
    end
  end
  return lost
end

function steps.reclaim() -- a page of what nobody renews waits again; returns the next page, and the calls given up
  local where, kind, cursor = ARGV[3], ARGV[4], ARGV[5]
  local lease, most, failure = ARGV[6], tonumber(ARGV[7]), ARGV[8]
  local stream, given_up = key(where, kind), {}
  local page = redis.pcall('XAUTOCLAIM', stream, GROUP, 'sweeper', lease, cursor, 'COUNT', 100)
  if page.err then return {'0-0', given_up} end -- there is no group: nothing was ever taken
  for _, entry in ipairs(page[2]) do
    if entry and entry[2] then
      local work = fields(entry)
      local deaths = work.deaths + 1
      remove(stream, entry[1])
      if work.payload == '' then
        if deaths < most * LOST_BELLS then queue('first', kind, work.id, '', '', deaths) end
      elseif deaths < most then
        redis.call('SET', key('owner', work.id), '')
        queue('first', kind, work.id, work.payload, work.request, deaths)
      else
        redis.call('DEL', key('owner', work.id))
        if not ending(work.id).last then
          say(work.id, '', 0, 'error', failure, true)
          given_up[#given_up + 1] = {work.id, work.request}
        end
      end
    end
  end
  return {page[1], given_up}
end

function steps.prune() -- consumers that hold nothing: the one named, and those that have not been seen for so long
  local leaving, silence = ARGV[3], tonumber(ARGV[4])
  for i = 5, #ARGV do
    local consumers = redis.pcall('XINFO', 'CONSUMERS', ARGV[i], GROUP)
    for _, consumer in ipairs(consumers.err and {} or consumers) do
      local found = fields({'', consumer})
      if found.pending == 0 and (found.name == leaving or found.idle > silence) then
        redis.call('XGROUP', 'DELCONSUMER', ARGV[i], GROUP, found.name)
      end
    end
  end
end

function steps.publish() -- returns the channels on which we may not speak any more
  local fenced = {}
  for i = 3, #ARGV, 7 do
    local channel, hold, by, number = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
    local owner, newest = redis.call('GET', key('owner', channel)), ending(channel)
    local repeated = by ~= '' and newest.by == by and tonumber(newest.number) >= number
    if hold ~= '' and owner and owner ~= hold then
      fenced[#fenced + 1] = channel
    elseif not (newest.last or repeated) then
      say(channel, by, number, ARGV[i + 4], ARGV[i + 5], ARGV[i + 6] == '1')
    end
  end
  return fenced
end

function steps.cancel()
  local channel = ARGV[3]
  if not ending(channel).last then redis.call('SET', key('cancel', channel), 1, 'EX', KEPT_SECONDS) end
end

function steps.wake() redis.call('SET', key('woken'), ring()) end

function steps.ring() ring() end

function steps.oldest()
  local first = redis.call('ZRANGE', key('waiting', ARGV[3]), 0, 0, 'WITHSCORES')
  return first[2] and now() - first[2] or 0
end

return steps[step]()
