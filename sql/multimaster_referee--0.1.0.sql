-- The referee of clusters with two nodes: plain SQL for any PostgreSQL from 12 on, without the library of multimaster.
-- Without the extension's files run this script by hand after CREATE SCHEMA mtm_referee.

CREATE TABLE mtm_referee.grants (
    cluster text PRIMARY KEY,
    num bigint NOT NULL CHECK (num > 0),
    node integer NOT NULL CHECK (node > 0),
    others bigint NOT NULL CHECK (others >= 0 AND others < num),
    granted_at timestamptz NOT NULL
);
COMMENT ON TABLE mtm_referee.grants IS
    'the last generation of one node that was granted, by cluster; never restore an older copy of it';

-- The rule is that of protocol::membership::Referee: a node has to have been online above the last number that the other one was granted (others), and
-- asks for a number above all, or for what was granted last.
CREATE FUNCTION mtm_referee.ask(cluster text, node integer, num bigint, online_in bigint, OUT granted boolean, OUT latest bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$
BEGIN
    -- An answer that a crash takes back would let both nodes go on alone.
    PERFORM set_config('synchronous_commit', 'on', true);
    INSERT INTO mtm_referee.grants AS known (cluster, num, node, others, granted_at)
        SELECT ask.cluster, ask.num, ask.node, 0, now() WHERE ask.online_in > 0
        ON CONFLICT ON CONSTRAINT grants_pkey DO UPDATE
            SET num = excluded.num, node = excluded.node, granted_at = excluded.granted_at,
                others = CASE WHEN known.node = excluded.node THEN known.others ELSE known.num END
            WHERE known.num < excluded.num
                AND ask.online_in > CASE WHEN known.node = excluded.node THEN known.others ELSE known.num END;
    SELECT known.num = ask.num AND known.node = ask.node AND ask.online_in > known.others, known.num
        INTO granted, latest
        FROM mtm_referee.grants AS known WHERE known.cluster = ask.cluster;
    IF NOT FOUND THEN
        granted := false;
        latest := 0;
    END IF;
END
$$;
COMMENT ON FUNCTION mtm_referee.ask(text, integer, bigint, bigint) IS
    'whether a node of a cluster may go on alone in the generation of this number';
REVOKE ALL ON FUNCTION mtm_referee.ask(text, integer, bigint, bigint) FROM PUBLIC;

-- A dump of the database carries the grants, if it is made when nobody asks any more. Run by hand, the script belongs to no extension.
DO $$
BEGIN
    PERFORM pg_catalog.pg_extension_config_dump('mtm_referee.grants', '');
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
