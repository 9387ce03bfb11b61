//! The layouts and constants that the bindings claim are those of the installed C headers: a C compiler is asked. It needs no
//! device, only the headers (libibverbs-dev, librdmacm-dev); it says nothing about what functions do.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::mem::offset_of;
use std::process::Command;

#[path = "../../../tests/rig/skip.rs"]
#[allow(unreachable_pub, dead_code)]
mod skip;

/// C expressions with the values that the bindings give them.
type Claims = Vec<(String, u64)>;

/// `claims!(list, struct c_name = RustType { c_field = rust.field, … })`: the size, and the offset of each field.
macro_rules! claims {
    ($list:ident, $kind:ident $name:ident { $($c:tt = $field:ident),* $(,)? }) => {
        let name = format!("{} {}", stringify!($kind), stringify!($name));
        $list.push((format!("sizeof({name})"), size_of::<rdma_sys::$name>() as u64));
        $($list.push((format!("offsetof({name}, {})", $c), offset_of!(rdma_sys::$name, $field) as u64));)*
    };
}

macro_rules! numbers {
    ($list:ident, $($name:ident = $value:expr),* $(,)?) => {
        $list.extend([$((stringify!($name).to_owned(), u64::from($value))),*]);
    };
}

fn structs_of_requests() -> Claims {
    let mut list = Claims::new();
    claims!(list, struct ibv_send_wr {
        "wr_id" = wr_id, "next" = next, "sg_list" = sg_list, "num_sge" = num_sge, "opcode" = opcode,
        "send_flags" = send_flags, "imm_data" = imm_data_invalidated_rkey_union, "wr" = wr,
        "qp_type" = qp_type, "bind_mw" = bind_mw_tso_union,
    });
    list.push((
        "offsetof(struct ibv_send_wr, wr.rdma.rkey) - offsetof(struct ibv_send_wr, wr)".to_owned(),
        offset_of!(rdma_sys::rdma_t, rkey) as u64,
    ));
    claims!(list, struct ibv_recv_wr { "wr_id" = wr_id, "next" = next, "sg_list" = sg_list, "num_sge" = num_sge });
    claims!(list, struct ibv_sge { "addr" = addr, "length" = length, "lkey" = lkey });
    claims!(list, struct ibv_wc {
        "wr_id" = wr_id, "status" = status, "opcode" = opcode, "vendor_err" = vendor_err, "byte_len" = byte_len,
        "imm_data" = imm_data_invalidated_rkey_union, "qp_num" = qp_num, "wc_flags" = wc_flags,
    });
    list
}

fn structs_of_handles() -> Claims {
    let mut list = Claims::new();
    claims!(list, struct ibv_qp { "context" = context, "qp_num" = qp_num, "state" = state, "qp_type" = qp_type });
    claims!(list, struct ibv_cq { "context" = context, "channel" = channel, "cqe" = cqe });
    claims!(list, struct ibv_mr { "addr" = addr, "length" = length, "lkey" = lkey, "rkey" = rkey });
    claims!(list, struct ibv_comp_channel { "fd" = fd });
    claims!(list, struct ibv_device { "transport_type" = transport_type, "name" = name, "dev_name" = dev_name });
    claims!(list, struct ibv_context {
        "device" = device, "ops" = ops, "cmd_fd" = cmd_fd, "async_fd" = async_fd, "abi_compat" = abi_compat,
    });
    claims!(list, struct ibv_context_ops {
        "poll_cq" = poll_cq, "req_notify_cq" = req_notify_cq, "post_send" = post_send, "post_recv" = post_recv,
    });
    claims!(list, struct verbs_context {
        "query_port" = query_port, "query_device_ex" = query_device_ex, "sz" = sz, "context" = context,
    });
    claims!(list, struct ibv_async_event { "element" = element, "event_type" = event_type });
    list
}

fn structs_of_attributes() -> Claims {
    let mut list = Claims::new();
    claims!(list, struct ibv_qp_init_attr {
        "send_cq" = send_cq, "recv_cq" = recv_cq, "srq" = srq, "cap" = cap, "qp_type" = qp_type, "sq_sig_all" = sq_sig_all,
    });
    claims!(list, struct ibv_qp_cap {
        "max_send_wr" = max_send_wr, "max_recv_wr" = max_recv_wr, "max_send_sge" = max_send_sge,
        "max_recv_sge" = max_recv_sge, "max_inline_data" = max_inline_data,
    });
    claims!(list, struct ibv_qp_attr {
        "qp_state" = qp_state, "path_mtu" = path_mtu, "qp_access_flags" = qp_access_flags, "ah_attr" = ah_attr,
        "min_rnr_timer" = min_rnr_timer, "port_num" = port_num, "timeout" = timeout, "retry_cnt" = retry_cnt, "rnr_retry" = rnr_retry,
    });
    claims!(list, struct ibv_ah_attr { "grh" = grh, "port_num" = port_num });
    claims!(list, struct ibv_global_route { "dgid" = dgid, "sgid_index" = sgid_index });
    claims!(list, struct ibv_device_attr {
        "fw_ver" = fw_ver, "max_mr_size" = max_mr_size, "max_qp" = max_qp, "max_qp_wr" = max_qp_wr, "max_cqe" = max_cqe,
        "max_mr" = max_mr, "phys_port_cnt" = phys_port_cnt,
    });
    claims!(list, struct ibv_device_attr_ex { "orig_attr" = orig_attr, "odp_caps" = odp_caps });
    claims!(list, struct ibv_odp_caps { "general_caps" = general_caps, "per_transport_caps" = per_transport_caps });
    claims!(list, struct ibv_port_attr {
        "state" = state, "max_mtu" = max_mtu, "active_mtu" = active_mtu, "link_layer" = link_layer,
    });
    list
}

fn structs_of_connections() -> Claims {
    let mut list = Claims::new();
    claims!(list, struct rdma_cm_id { "verbs" = verbs, "channel" = channel, "qp" = qp, "route" = route, "port_num" = port_num });
    claims!(list, struct rdma_event_channel { "fd" = fd });
    claims!(list, struct rdma_conn_param {
        "private_data" = private_data, "private_data_len" = private_data_len, "responder_resources" = responder_resources,
        "initiator_depth" = initiator_depth, "flow_control" = flow_control, "retry_count" = retry_count,
        "rnr_retry_count" = rnr_retry_count, "srq" = srq, "qp_num" = qp_num,
    });
    claims!(list, struct rdma_cm_event {
        "id" = id, "listen_id" = listen_id, "event" = event, "status" = status, "param" = param,
    });
    claims!(list, struct rdma_route { "addr" = addr });
    claims!(list, struct rdma_addr { "src_addr" = src_addr_union, "dst_addr" = dst_addr_union, "addr" = addr });
    list
}

fn constants() -> Claims {
    use rdma_sys::*;
    let mut list = Claims::new();
    numbers!(
        list,
        IBV_WC_SUCCESS = ibv_wc_status::IBV_WC_SUCCESS,
        IBV_WC_WR_FLUSH_ERR = ibv_wc_status::IBV_WC_WR_FLUSH_ERR,
        IBV_WC_REM_ACCESS_ERR = ibv_wc_status::IBV_WC_REM_ACCESS_ERR,
        IBV_WC_RETRY_EXC_ERR = ibv_wc_status::IBV_WC_RETRY_EXC_ERR,
        IBV_WC_RNR_RETRY_EXC_ERR = ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR
    );
    numbers!(
        list,
        IBV_WR_RDMA_WRITE = ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        IBV_WR_SEND = ibv_wr_opcode::IBV_WR_SEND,
        IBV_WR_RDMA_WRITE_WITH_IMM = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
        IBV_WR_SEND_WITH_IMM = ibv_wr_opcode::IBV_WR_SEND_WITH_IMM
    );
    numbers!(
        list,
        IBV_SEND_SIGNALED = ibv_send_flags::IBV_SEND_SIGNALED.0,
        IBV_SEND_INLINE = ibv_send_flags::IBV_SEND_INLINE.0,
        IBV_QP_STATE = ibv_qp_attr_mask::IBV_QP_STATE.0,
        IBV_QP_ACCESS_FLAGS = ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS.0,
        IBV_ACCESS_LOCAL_WRITE = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
        IBV_ACCESS_REMOTE_WRITE = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
        IBV_ACCESS_ON_DEMAND = ibv_access_flags::IBV_ACCESS_ON_DEMAND.0,
        IBV_ACCESS_RELAXED_ORDERING = ibv_access_flags::IBV_ACCESS_RELAXED_ORDERING.0
    );
    numbers!(
        list,
        IBV_QPS_INIT = ibv_qp_state::IBV_QPS_INIT,
        IBV_QPS_RTR = ibv_qp_state::IBV_QPS_RTR,
        IBV_QPS_RTS = ibv_qp_state::IBV_QPS_RTS,
        IBV_QPS_ERR = ibv_qp_state::IBV_QPS_ERR,
        IBV_QPT_RC = ibv_qp_type::IBV_QPT_RC,
        IBV_EVENT_CQ_ERR = ibv_event_type::IBV_EVENT_CQ_ERR,
        IBV_EVENT_DEVICE_FATAL = ibv_event_type::IBV_EVENT_DEVICE_FATAL,
        IBV_PORT_ACTIVE = ibv_port_state::IBV_PORT_ACTIVE
    );
    numbers!(
        list,
        RDMA_PS_TCP = rdma_port_space::RDMA_PS_TCP,
        RDMA_CM_EVENT_CONNECT_REQUEST = rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST,
        RDMA_CM_EVENT_CONNECT_RESPONSE = rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE,
        RDMA_CM_EVENT_REJECTED = rdma_cm_event_type::RDMA_CM_EVENT_REJECTED,
        RDMA_CM_EVENT_ESTABLISHED = rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED,
        RDMA_CM_EVENT_DISCONNECTED = rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED
    );
    // Those that the crate writes down itself.
    numbers!(
        list,
        IBV_WC_WITH_IMM = 2_u32,
        IBV_ODP_SUPPORT = 1_u32,
        IBV_ODP_SUPPORT_SEND = 1_u32,
        IBV_ODP_SUPPORT_RECV = 2_u32,
        IBV_ODP_SUPPORT_WRITE = 4_u32,
        IBV_LINK_LAYER_INFINIBAND = 1_u32,
        IBV_LINK_LAYER_ETHERNET = 2_u32
    );
    list
}

#[test]
fn layouts_and_constants_are_those_of_the_headers() {
    let claims: Claims =
        [structs_of_requests(), structs_of_handles(), structs_of_attributes(), structs_of_connections(), constants()].concat();
    assert!(claims.len() >= 100, "only {} claims", claims.len());
    let folder = tempfile::tempdir().unwrap();
    let (program, source) = (folder.path().join("layout"), folder.path().join("layout.c"));
    let prints: String =
        claims.iter().map(|(expression, _)| format!("    printf(\"%llu\\n\", (unsigned long long)({expression}));\n")).collect();
    let includes = "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n";
    std::fs::write(&source, format!("{includes}int main(void) {{\n{prints}    return 0;\n}}\n")).unwrap();
    let compiled = match Command::new("cc").arg("-o").arg(&program).arg(&source).output() {
        Ok(compiled) => compiled,
        Err(error) => return skip::skip(&format!("no C compiler to ask about layouts: {error}")),
    };
    let said = String::from_utf8_lossy(&compiled.stderr);
    if said.contains("infiniband/verbs.h: No such file") || said.contains("rdma/rdma_cma.h: No such file") {
        return skip::skip("no headers to compare layouts with: install libibverbs-dev and librdmacm-dev");
    }
    assert!(compiled.status.success(), "{said}");
    let ran = Command::new(&program).output().unwrap();
    let answers: Vec<u64> = String::from_utf8(ran.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(answers.len(), claims.len());
    let wrong: Vec<String> = claims
        .iter()
        .zip(&answers)
        .filter(|((_, ours), theirs)| ours != *theirs)
        .map(|((expression, ours), theirs)| format!("{expression}: {ours} in the bindings, {theirs} in the headers"))
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), claims.len(), wrong.join("\n"));
    println!("{} sizes, offsets and constants are those of C", claims.len());
}
