//! Which triggers fire when rows are applied.
//!
//! A trigger's effects on rows are in the stream already, so triggers stay silent, unless they were enabled for
//! replicas. What must fire is what guards the data against rows the origin could not see: a child that was inserted on one
//! node while its parent was deleted on another passes every check on its own node; only the checks made here, against the rows here,
//! find out.
//!
//! All changes of a transaction are one statement here. RESTRICT, which does not wait for the end of a statement, would object to a
//! parent row that was deleted and inserted again; NO ACTION, which does, asks the same question of what is left.

use pgrx::pg_sys;

// Oids of the functions of core's constraint triggers (pg_proc.dat); they are the same in every version.
const CHECK_INSERT: u32 = 1644;
const CHECK_UPDATE: u32 = 1645;
const RESTRICT_DELETE: u32 = 1648;
const RESTRICT_UPDATE: u32 = 1649;
const NO_ACTION_DELETE: u32 = 1654;
const NO_ACTION_UPDATE: u32 = 1655;
const UNIQUE_RECHECK: u32 = 1250;

const FIRES_ALWAYS: u8 = b'A';
const FIRES_ON_REPLICA: u8 = b'R';
const DISABLED: u8 = b'D';

/// What becomes of a trigger.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Silent,
    /// Fires, and calls this function.
    Fires(u32),
}

fn fate(function: u32, internal: bool, enabled: u8) -> Fate {
    if !internal {
        return match enabled {
            FIRES_ALWAYS | FIRES_ON_REPLICA => Fate::Fires(function),
            _ => Fate::Silent,
        };
    }
    match function {
        _ if enabled == DISABLED => Fate::Silent,
        CHECK_INSERT | CHECK_UPDATE | NO_ACTION_DELETE | NO_ACTION_UPDATE | UNIQUE_RECHECK => {
            Fate::Fires(function)
        }
        RESTRICT_DELETE => Fate::Fires(NO_ACTION_DELETE),
        RESTRICT_UPDATE => Fate::Fires(NO_ACTION_UPDATE),
        // Cascades: the rows they touched on the origin are in the stream.
        _ => Fate::Silent,
    }
}

/// Takes the silent triggers out of a copy of a table's triggers; null when none is left.
///
/// # Safety
/// `triggers` is null or the private copy of a ResultRelInfo.
pub unsafe fn keep_firing(triggers: *mut pg_sys::TriggerDesc) -> *mut pg_sys::TriggerDesc {
    // SAFETY: as the caller promises; the array has `numtriggers` elements.
    unsafe {
        let Some(description) = triggers.as_mut() else {
            return triggers;
        };
        let all =
            std::slice::from_raw_parts_mut(description.triggers, description.numtriggers as usize);
        let mut kept = 0;
        for index in 0..all.len() {
            let mut trigger = all[index];
            let fate = fate(
                trigger.tgfoid.to_u32(),
                trigger.tgisinternal,
                trigger.tgenabled as u8,
            );
            if let Fate::Fires(function) = fate {
                trigger.tgfoid = pg_sys::Oid::from_u32(function);
                trigger.tgenabled = FIRES_ALWAYS as std::ffi::c_char;
                all[kept] = trigger;
                kept += 1;
            }
        }
        set_events(description, &all[..kept]);
        if kept == 0 {
            std::ptr::null_mut()
        } else {
            triggers
        }
    }
}

/// Says again which events have row triggers; statement triggers never fire here.
fn set_events(description: &mut pg_sys::TriggerDesc, kept: &[pg_sys::Trigger]) {
    let any = |timing: u32, event: u32| {
        kept.iter().any(|trigger| {
            let kind = trigger.tgtype as u32;
            kind & pg_sys::TRIGGER_TYPE_ROW != 0
                && kind & pg_sys::TRIGGER_TYPE_TIMING_MASK == timing
                && kind & event != 0
        })
    };
    let (before, after) = (pg_sys::TRIGGER_TYPE_BEFORE, pg_sys::TRIGGER_TYPE_AFTER);
    description.numtriggers = kept.len() as i32;
    description.trig_insert_before_row = any(before, pg_sys::TRIGGER_TYPE_INSERT);
    description.trig_insert_after_row = any(after, pg_sys::TRIGGER_TYPE_INSERT);
    description.trig_update_before_row = any(before, pg_sys::TRIGGER_TYPE_UPDATE);
    description.trig_update_after_row = any(after, pg_sys::TRIGGER_TYPE_UPDATE);
    description.trig_delete_before_row = any(before, pg_sys::TRIGGER_TYPE_DELETE);
    description.trig_delete_after_row = any(after, pg_sys::TRIGGER_TYPE_DELETE);
}

/// Whether a kept trigger may ask which columns an update changed.
///
/// # Safety
/// `triggers` is null or valid.
pub unsafe fn watch_columns(triggers: *const pg_sys::TriggerDesc) -> bool {
    // SAFETY: as the caller promises.
    unsafe {
        triggers.as_ref().is_some_and(|description| {
            let all =
                std::slice::from_raw_parts(description.triggers, description.numtriggers as usize);
            description.trig_update_before_row || all.iter().any(|trigger| trigger.tgnattr > 0)
        })
    }
}

/// Whether a kept trigger runs before rows are updated or deleted.
///
/// # Safety
/// `triggers` is null or valid.
pub unsafe fn run_before(triggers: *const pg_sys::TriggerDesc) -> bool {
    // SAFETY: as the caller promises.
    unsafe { triggers.as_ref() }.is_some_and(|description| {
        description.trig_update_before_row || description.trig_delete_before_row
    })
}

/// Whether a kept trigger runs before rows are inserted.
///
/// # Safety
/// `triggers` is null or valid.
pub unsafe fn run_before_insert(triggers: *const pg_sys::TriggerDesc) -> bool {
    // SAFETY: as the caller promises.
    unsafe { triggers.as_ref() }.is_some_and(|description| description.trig_insert_before_row)
}

/// Whether a kept trigger runs after rows were changed.
///
/// # Safety
/// `triggers` is null or valid.
pub unsafe fn run_after(triggers: *const pg_sys::TriggerDesc) -> bool {
    // SAFETY: as the caller promises.
    unsafe { triggers.as_ref() }.is_some_and(|description| {
        description.trig_insert_after_row
            || description.trig_update_after_row
            || description.trig_delete_after_row
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constraints_fire_and_cascades_do_not() {
        let cascade_delete = 1646;
        let origin = b'O';
        assert_eq!(fate(CHECK_INSERT, true, origin), Fate::Fires(CHECK_INSERT));
        assert_eq!(
            fate(UNIQUE_RECHECK, true, origin),
            Fate::Fires(UNIQUE_RECHECK)
        );
        assert_eq!(fate(cascade_delete, true, origin), Fate::Silent);
        assert_eq!(
            fate(RESTRICT_DELETE, true, origin),
            Fate::Fires(NO_ACTION_DELETE)
        );
        assert_eq!(fate(CHECK_INSERT, true, DISABLED), Fate::Silent);
    }

    #[test]
    fn user_triggers_fire_only_when_enabled_for_replicas() {
        let function = 16_400;
        assert_eq!(fate(function, false, b'O'), Fate::Silent);
        assert_eq!(fate(function, false, b'A'), Fate::Fires(function));
        assert_eq!(fate(function, false, b'R'), Fate::Fires(function));
        assert_eq!(fate(function, false, b'D'), Fate::Silent);
    }
}
