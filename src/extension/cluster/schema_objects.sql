-- One row per object of the database that the nodes of a cluster must share: (name, hash of its definition).
-- Objects of extensions are represented by the extension and its version.
WITH own AS (
    SELECT oid, nspname, nspowner, nspacl
      FROM pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'mtm')
), belongs AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
), rel AS (
    SELECT c.*, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS ident
      FROM pg_class c
      JOIN own n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c')
       AND c.relpersistence <> 't'
       AND NOT EXISTS (SELECT FROM belongs b WHERE b.classid = 'pg_class'::regclass AND b.objid = c.oid)
), object (name, definition) AS (
    SELECT 'extension ' || quote_ident(extname), extversion
      FROM pg_extension
     WHERE extname <> 'multimaster'
    UNION ALL
    SELECT 'schema ' || quote_ident(nspname), pg_get_userbyid(nspowner) || coalesce(nspacl::text, '')
      FROM own
     WHERE NOT EXISTS (SELECT FROM belongs b WHERE b.classid = 'pg_namespace'::regclass AND b.objid = own.oid)
    UNION ALL
    SELECT 'relation ' || r.ident,
           concat_ws('|', r.relkind, r.relpersistence, pg_get_userbyid(r.relowner), r.relacl::text, r.relreplident, r.reloptions::text,
                     r.relrowsecurity, r.relforcerowsecurity, pg_get_expr(r.relpartbound, r.oid),
                     CASE WHEN r.relkind = 'p' THEN pg_get_partkeydef(r.oid) END,
                     CASE WHEN r.relkind IN ('v', 'm') THEN pg_get_viewdef(r.oid) END,
                     (SELECT string_agg(i.inhparent::regclass::text, ',' ORDER BY i.inhseqno) FROM pg_inherits i WHERE i.inhrelid = r.oid),
                     (SELECT string_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                                                  a.attgenerated, l.collname, pg_get_expr(d.adbin, d.adrelid)), ',' ORDER BY a.attname)
                        FROM pg_attribute a
                        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                        LEFT JOIN pg_collation l ON l.oid = a.attcollation
                       WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped),
                     (SELECT concat_ws(' ', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcycle)
                        FROM pg_sequence s WHERE s.seqrelid = r.oid))
      FROM rel r
    UNION ALL
    SELECT 'constraint ' || quote_ident(k.conname) || ' of ' || coalesce(r.ident, k.contypid::regtype::text),
           pg_get_constraintdef(k.oid) || k.convalidated
      FROM pg_constraint k
      JOIN own n ON n.oid = k.connamespace
      LEFT JOIN rel r ON r.oid = k.conrelid
     WHERE r.oid IS NOT NULL OR k.contypid <> 0
    UNION ALL
    SELECT 'index ' || i.indexrelid::regclass, pg_get_indexdef(i.indexrelid) || i.indisvalid || i.indisreplident
      FROM pg_index i
      JOIN rel r ON r.oid = i.indrelid
    UNION ALL
    SELECT 'trigger ' || quote_ident(t.tgname) || ' of ' || r.ident, concat_ws('|', pg_get_triggerdef(t.oid), t.tgenabled)
      FROM pg_trigger t
      JOIN rel r ON r.oid = t.tgrelid
     WHERE NOT t.tgisinternal
    UNION ALL
    SELECT 'rule ' || quote_ident(u.rulename) || ' of ' || r.ident, concat_ws('|', pg_get_ruledef(u.oid), u.ev_enabled)
      FROM pg_rewrite u
      JOIN rel r ON r.oid = u.ev_class
     WHERE u.rulename <> '_RETURN'
    UNION ALL
    SELECT 'policy ' || quote_ident(p.polname) || ' of ' || r.ident,
           concat_ws('|', p.polcmd, p.polpermissive, pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid),
                     (SELECT string_agg(pg_get_userbyid(m), ',' ORDER BY pg_get_userbyid(m)) FROM unnest(p.polroles) m))
      FROM pg_policy p
      JOIN rel r ON r.oid = p.polrelid
    UNION ALL
    SELECT 'function ' || f.oid::regprocedure,
           concat_ws('|', pg_get_userbyid(f.proowner), f.proacl::text, f.prokind, pg_get_function_result(f.oid),
                     CASE WHEN f.prokind <> 'a' THEN pg_get_functiondef(f.oid) END)
      FROM pg_proc f
      JOIN own n ON n.oid = f.pronamespace
     WHERE NOT EXISTS (SELECT FROM belongs b WHERE b.classid = 'pg_proc'::regclass AND b.objid = f.oid)
    UNION ALL
    SELECT 'type ' || format_type(t.oid, NULL),
           concat_ws('|', t.typtype, pg_get_userbyid(t.typowner), t.typnotnull, t.typdefault,
                     CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, t.typtypmod) END,
                     (SELECT string_agg(quote_literal(e.enumlabel), ',' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid),
                     (SELECT format_type(g.rngsubtype, NULL) FROM pg_range g WHERE g.rngtypid = t.oid))
      FROM pg_type t
      JOIN own n ON n.oid = t.typnamespace
     WHERE t.typtype IN ('e', 'd', 'r', 'b') AND t.typelem = 0
       AND NOT EXISTS (SELECT FROM belongs b WHERE b.classid = 'pg_type'::regclass AND b.objid = t.oid)
    UNION ALL
    SELECT 'collation ' || quote_ident(n.nspname) || '.' || quote_ident(l.collname),
           concat_ws('|', l.collprovider, l.collisdeterministic, l.collcollate, l.collctype, pg_collation_actual_version(l.oid))
      FROM pg_collation l
      JOIN own n ON n.oid = l.collnamespace
    UNION ALL
    SELECT 'event trigger ' || quote_ident(evtname), concat_ws('|', evtevent, evtenabled, evtfoid::regprocedure, evttags::text)
      FROM pg_event_trigger
    UNION ALL
    SELECT 'statistics ' || quote_ident(n.nspname) || '.' || quote_ident(x.stxname), pg_get_statisticsobjdef(x.oid)
      FROM pg_statistic_ext x
      JOIN own n ON n.oid = x.stxnamespace
)
SELECT name, md5(coalesce(definition, ''))
  FROM object
