"""An application as its author would write it: several hosts, a new connection where one no longer works, and 08007 looked into before
anything is repeated. Writes the rows 1, 2, 3, ... of table `line` and says on standard output which node each came to.

Arguments: the connection string, and how many rows to write after the first node has been left."""

import sys
import time

import psycopg

CONNINFO, ROWS_AFTER = sys.argv[1], int(sys.argv[2])
PAUSE_S = 0.02


def say(*words):
    print(*words, flush=True)


def connected():
    """A session on a node that takes writes, however long that takes."""
    while True:
        try:
            return psycopg.connect(CONNINFO)
        except psycopg.OperationalError as error:
            say("refused", error.sqlstate)
            time.sleep(PAUSE_S)


def outcome(gid):
    """How a transaction has ended, of which COMMIT did not say it. Nobody may know before its node is back."""
    while True:
        try:
            with connected() as session:
                node = session.execute("SELECT my_node_id FROM mtm.status()").fetchone()[0]
                status = session.execute("SELECT mtm.transaction_status(%s)", [gid]).fetchone()[0]
            say("asked", node, status)
            if status in ("committed", "aborted"):
                return status
        except psycopg.OperationalError as error:
            say("cannot tell", error.sqlstate)
        time.sleep(PAUSE_S)


def write(session, number):
    """Commits one row; whether it is there."""
    gid = None
    try:
        gid = session.execute("SELECT mtm.current_gid()").fetchone()[0]
        session.execute("INSERT INTO line VALUES (%s)", [number])
        session.commit()
        return True
    except psycopg.errors.SerializationFailure as error:
        say("again", error.sqlstate)
        session.rollback()
        return False
    except psycopg.OperationalError as error:
        # 08007, and a connection that broke during COMMIT, say nothing of the outcome; 57P03 says that nothing happened.
        say("lost", error.sqlstate)
        session.close()
        if error.sqlstate == "57P03":
            return False
        return gid is not None and outcome(gid) == "committed"


def main():
    session, first, number, left = connected(), None, 1, 0
    while left < ROWS_AFTER:
        if session.closed:
            session = connected()
        try:
            node = session.execute("SELECT my_node_id FROM mtm.status()").fetchone()[0]
        except psycopg.OperationalError:
            session.close()
            continue
        if write(session, number):
            say("row", number, "node", node)
            first = first or node
            left += node != first
            number += 1
        time.sleep(PAUSE_S)
    say("written", number - 1)


main()
