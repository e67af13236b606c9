/*
 * Another extension's background worker: run_in_worker(sql) starts one that runs the statement in a transaction of its
 * own, and waits for its end.
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(run_in_worker);
PGDLLEXPORT void worker_main(Datum database);

void
worker_main(Datum database)
{
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(database), InvalidOid, 0);
	StartTransactionCommand();
	SPI_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
	SPI_execute(MyBgworkerEntry->bgw_extra, false, 0);
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
}

Datum
run_in_worker(PG_FUNCTION_ARGS)
{
	BackgroundWorker worker = {0};
	BackgroundWorkerHandle *handle;

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_name, "stranger's worker", BGW_MAXLEN);
	strlcpy(worker.bgw_library_name, WORKER_LIBRARY, BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "worker_main", BGW_MAXLEN);
	strlcpy(worker.bgw_extra, text_to_cstring(PG_GETARG_TEXT_PP(0)), BGW_EXTRALEN);
	worker.bgw_main_arg = ObjectIdGetDatum(MyDatabaseId);
	worker.bgw_notify_pid = MyProcPid;
	if (!RegisterDynamicBackgroundWorker(&worker, &handle))
		ereport(ERROR, (errmsg("no background worker is free")));
	WaitForBackgroundWorkerShutdown(handle);
	PG_RETURN_VOID();
}
