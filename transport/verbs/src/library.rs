//! Loading libibverbs and librdmacm: one table of functions, filled once. Which device there is, is not its business.
//!
//! Soundness: the types of the functions are compared by the compiler with those that rdma-sys declares
//! (`same_as_declared`), and a library that was loaded is never unloaded, so a function pointer stays valid.

use crate::error::NoRdma;
use rdma_sys::{
    _compat_ibv_port_attr, ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_mr, ibv_pd,
    ibv_qp, ibv_qp_attr, ibv_qp_init_attr, rdma_cm_event, rdma_cm_id, rdma_conn_param, rdma_event_channel, rdma_port_space,
};
use std::error::Error as _;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

static LIBRARY: OnceLock<Library> = OnceLock::new();

/// The functions of both libraries.
#[derive(Debug)]
pub struct Library {
    pub(crate) verbs: Verbs,
    pub(crate) manager: Manager,
}

impl Library {
    /// Loads the libraries, or gives what was loaded before. A failure is not remembered: they may be installed later.
    ///
    /// # Errors
    /// [`NoRdma::LibraryMissing`] and [`NoRdma::SymbolMissing`].
    pub fn load() -> Result<&'static Library, NoRdma> {
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = Library { verbs: Verbs::load()?, manager: Manager::load()? };
        Ok(LIBRARY.get_or_init(|| library))
    }
}

fn open(library: &'static str, package: &'static str) -> Result<libloading::Library, NoRdma> {
    // SAFETY: the initialisers of rdma-core's libraries, which the system's administrator installed, may run at any time
    // on any thread; nothing of ours depends on what they set up.
    let opened = unsafe { libloading::Library::new(library) };
    opened.map_err(|error| {
        // What the dynamic linker said is the error's source.
        let said = error.source().map_or_else(|| error.to_string(), |linker| linker.to_string());
        NoRdma::LibraryMissing { library, said, package }
    })
}

/// Declares a table: a struct with one field for each function, its loader, and the comparison with rdma-sys.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident, $library:literal, $package:literal: $(fn $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $table {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            fn load() -> Result<$table, NoRdma> {
                let library = open($library, $package)?;
                let table = $table {
                    $($name: {
                        // SAFETY: the symbol is a function of this type: `same_as_declared` compares it with the header's.
                        let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        let missing = |_| NoRdma::SymbolMissing { library: $library, function: stringify!($name) };
                        *symbol.map_err(missing)?
                    },)*
                };
                // Never unloaded: the table lives as long as the process.
                std::mem::forget(library);
                Ok(table)
            }

            /// Compiled as far as types go, and never made into code: it is generic and nobody calls it. So the names of the
            /// libraries' functions do not reach the linker.
            #[allow(dead_code, clippy::extra_unused_type_parameters)]
            fn same_as_declared<T>() {
                $(let _: unsafe extern "C" fn($($argument),*) $(-> $result)? = rdma_sys::$name;)*
            }
        }
    };
}

functions! {
    /// Functions of libibverbs that are not inline in its header.
    Verbs, "libibverbs.so.1", "libibverbs1":
    fn ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
    fn ibv_free_device_list(*mut *mut ibv_device);
    fn ibv_get_device_name(*mut ibv_device) -> *const c_char;
    fn ibv_get_device_guid(*mut ibv_device) -> u64;
    fn ibv_open_device(*mut ibv_device) -> *mut ibv_context;
    fn ibv_close_device(*mut ibv_context) -> c_int;
    fn ibv_query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(*mut ibv_context, u8, *mut _compat_ibv_port_attr) -> c_int;
    fn ibv_get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
    fn ibv_ack_async_event(*mut ibv_async_event);
    fn ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
    fn ibv_dealloc_pd(*mut ibv_pd) -> c_int;
    fn ibv_reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    fn ibv_reg_mr_iova2(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
    fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
    fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
    fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
    fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    fn ibv_ack_cq_events(*mut ibv_cq, c_uint);
    fn ibv_create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    fn ibv_destroy_qp(*mut ibv_qp) -> c_int;
}

functions! {
    /// Functions of librdmacm.
    Manager, "librdmacm.so.1", "librdmacm1":
    fn rdma_create_event_channel() -> *mut rdma_event_channel;
    fn rdma_destroy_event_channel(*mut rdma_event_channel);
    fn rdma_create_id(*mut rdma_event_channel, *mut *mut rdma_cm_id, *mut c_void, rdma_port_space::Type) -> c_int;
    fn rdma_destroy_id(*mut rdma_cm_id) -> c_int;
    fn rdma_bind_addr(*mut rdma_cm_id, *mut libc::sockaddr) -> c_int;
    fn rdma_listen(*mut rdma_cm_id, c_int) -> c_int;
    fn rdma_resolve_addr(*mut rdma_cm_id, *mut libc::sockaddr, *mut libc::sockaddr, c_int) -> c_int;
    fn rdma_resolve_route(*mut rdma_cm_id, c_int) -> c_int;
    fn rdma_init_qp_attr(*mut rdma_cm_id, *mut ibv_qp_attr, *mut c_int) -> c_int;
    fn rdma_connect(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
    fn rdma_establish(*mut rdma_cm_id) -> c_int;
    fn rdma_accept(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
    fn rdma_reject(*mut rdma_cm_id, *const c_void, u8) -> c_int;
    fn rdma_disconnect(*mut rdma_cm_id) -> c_int;
    fn rdma_migrate_id(*mut rdma_cm_id, *mut rdma_event_channel) -> c_int;
    fn rdma_get_cm_event(*mut rdma_event_channel, *mut *mut rdma_cm_event) -> c_int;
    fn rdma_ack_cm_event(*mut rdma_cm_event) -> c_int;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_said_with_its_package() {
        let error = open("libibverbs-of-another-world.so.1", "libibverbs1").unwrap_err().to_string();
        assert!(error.contains("libibverbs-of-another-world.so.1"), "{error}");
        assert!(error.contains("cannot open shared object file") && error.contains("install libibverbs1"), "{error}");
    }

    #[test]
    fn loading_twice_gives_the_same_table() {
        match (Library::load(), Library::load()) {
            (Ok(one), Ok(two)) => assert!(std::ptr::eq(one, two)),
            (Err(NoRdma::LibraryMissing { .. }), Err(NoRdma::LibraryMissing { .. })) => {}
            (one, two) => panic!("{one:?} and {two:?}"),
        }
    }
}
