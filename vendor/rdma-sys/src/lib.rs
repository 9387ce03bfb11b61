//! The types, constants and inline functions of libibverbs and librdmacm: a patched copy of rdma-sys 0.3.0, see README.md.
//! It links neither library: calling one of the `extern` functions fails at link time.
#![allow(non_snake_case, non_camel_case_types, non_upper_case_globals)]
#![allow(clippy::all, clippy::pedantic, warnings)]

use libc::*;

include!("bindings.rs");

mod types;
mod verbs;

pub use self::types::*;
pub use self::verbs::*;
