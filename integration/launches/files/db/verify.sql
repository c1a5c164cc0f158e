-- Every row of every table, in an order that does not depend on where it lies; without a
-- temporary file, which would change the disk.
set enable_seqscan = off;
copy (select * from pgbench_accounts order by aid) to stdout;
copy (select * from pgbench_tellers order by tid) to stdout;
copy (select * from pgbench_branches order by bid) to stdout;
copy (select * from pgbench_history order by mtime, tid, bid, aid, delta) to stdout;
