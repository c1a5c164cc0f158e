create table launch as select replace(gen_random_uuid()::text, '-', '') as token, 0 as counter;
