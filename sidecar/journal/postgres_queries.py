"""What is asked of PostgreSQL. Rows go to and fro by columns, as arrays."""

from __future__ import annotations

HEAD = "SELECT log_id, last_index, head_hash, last_sequence FROM log"
LOCK = "SELECT log_id, last_index, head_hash, last_sequence FROM log FOR UPDATE"
# A session that has locked the log's row and has waited for its client for a whole lease. Its writer's lease is over: one is
# renewed between transactions only. Not a session that is at work: it may be committing, or waiting for a standby.
END_STOPPED = """SELECT pid, application_name, pg_terminate_backend(pid)
  FROM log JOIN pg_stat_activity ON backend_xid = log.xmax
  WHERE wait_event_type = 'Client' AND state_change < clock_timestamp() - make_interval(secs => %s)"""
RENEW = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s)
  WHERE name = %s AND epoch = %s RETURNING epoch"""
TURN = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s), committed = %s
  WHERE name = %s AND epoch = %s RETURNING epoch"""
EPOCH = """INSERT INTO writers AS known VALUES (%s, 1, clock_timestamp() + make_interval(secs => %s), '')
  ON CONFLICT (name) DO UPDATE SET epoch = known.epoch + 1, lease_until = excluded.lease_until, committed = ''
  RETURNING epoch"""
DEAD = """SELECT FROM writers WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL)"""
FENCE = """UPDATE writers SET epoch = epoch + 1 WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL) RETURNING name, epoch"""

ENTRIES = "SELECT * FROM sealed WHERE entry_index >= %s ORDER BY entry_index LIMIT %s"
ENTRIES_BARE = """SELECT entry_index, header, previous_hash, entry_hash, ''::bytea FROM sealed
  WHERE entry_index >= %s ORDER BY entry_index LIMIT %s"""
ADMITTED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE sequence BETWEEN %s AND %s ORDER BY sequence LIMIT %s"""
UNFINISHED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE outcome IS NULL AND sequence BETWEEN %s AND %s ORDER BY sequence LIMIT %s"""
OUTCOMES = "SELECT sealed.* FROM items JOIN sealed ON entry_index = outcome WHERE sequence BETWEEN %s AND %s"
VERIFIED = "SELECT sealed.* FROM items JOIN sealed ON entry_index = verified WHERE sequence BETWEEN %s AND %s"
TAKEN = """WITH taken AS (UPDATE items SET owner = %s, attempt = attempt + 1
    WHERE outcome IS NULL AND owner = ANY(%s) RETURNING sequence, admitted, attempt)
  SELECT sealed.*, attempt FROM taken JOIN sealed ON entry_index = admitted ORDER BY sequence"""
STILL_UNFINISHED = "SELECT sequence FROM items WHERE outcome IS NULL AND sequence = ANY(%s::bigint[])"
TWINS = "SELECT sealed.* FROM twins JOIN sealed USING (entry_index) WHERE input_digest = ANY(%b::bytea[]) ORDER BY entry_index"
BINDINGS = """SELECT tenant, key, request_digest, first_sequence, count FROM keys
  WHERE key = ANY(%b::bytea[]) AND (expires_millis IS NULL OR expires_millis > %s)"""

WRITE_ENTRIES = """WITH made AS (INSERT INTO entries SELECT * FROM unnest(%b::bigint[], %b::bytea[], %b::bytea[]))
  INSERT INTO payloads SELECT * FROM unnest(%b::bigint[], %b::bytea[])"""
WRITE_ITEMS = "INSERT INTO items (sequence, admitted, owner) SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::text[])"
BIND = """INSERT INTO keys SELECT first, n, digest, tenant, key, n
    FROM unnest(%b::bigint[], %b::integer[], %b::bytea[], %b::bytea[], %b::bytea[]) AS bound (first, n, digest, tenant, key)
  ON CONFLICT (key, tenant) DO UPDATE SET first_sequence = excluded.first_sequence, count = excluded.count,
    request_digest = excluded.request_digest, unfinished = excluded.unfinished, expires_millis = NULL"""
END = """UPDATE items SET outcome = ended.entry_index FROM unnest(%b::bigint[], %b::bigint[]) AS ended (sequence, entry_index)
  WHERE items.sequence = ended.sequence"""
VERIFY = """UPDATE items SET verified = audited.entry_index
  FROM unnest(%b::bigint[], %b::bigint[]) AS audited (sequence, entry_index) WHERE items.sequence = audited.sequence"""
END_KEYED = """UPDATE keys SET unfinished = unfinished - n, expires_millis = CASE unfinished WHEN n THEN %s::bigint END
  FROM unnest(%b::bigint[], %b::integer[]) AS ended (first, n) WHERE first_sequence = first"""
WRITE_TWINS = """INSERT INTO twins SELECT * FROM unnest(%b::bytea[], %b::bytea[], %b::bigint[]) ON CONFLICT DO NOTHING"""
WRITE_NOTES = """INSERT INTO notes SELECT * FROM unnest(%b::bytea[], %b::bytea[])
  ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
PURGE = """DELETE FROM keys WHERE first_sequence IN
  (SELECT first_sequence FROM keys WHERE expires_millis <= %s ORDER BY expires_millis LIMIT %s)"""

DROP_ENDED = """DELETE FROM payloads WHERE entry_index IN (SELECT unnest(ARRAY[admitted, outcome])
  FROM items JOIN unnest(%b::bigint[], %b::bigint[]) AS ended (sequence, first) USING (sequence)
  WHERE NOT EXISTS (SELECT FROM keys WHERE first_sequence = first))"""
DROP_EXPIRED = """WITH expired AS
    (SELECT first_sequence, count FROM keys WHERE expires_millis <= %s ORDER BY expires_millis LIMIT %s),
  bound AS (UPDATE keys SET expires_millis = NULL FROM expired WHERE keys.first_sequence = expired.first_sequence)
  DELETE FROM payloads WHERE entry_index IN (SELECT unnest(ARRAY[admitted, outcome]) FROM items JOIN expired
    ON sequence BETWEEN expired.first_sequence AND expired.first_sequence + expired.count - 1)"""
