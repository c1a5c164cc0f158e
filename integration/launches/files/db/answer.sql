with visit as (update launch set counter = counter + 1 returning token, counter)
select json_build_object('token', token, 'counter', counter, 'account', aid, 'balance', abalance)
from visit, pgbench_accounts where aid = :account;
