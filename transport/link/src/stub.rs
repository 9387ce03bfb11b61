//! stub
#![allow(missing_docs, dead_code, unused)]
use limosa_proto::event::*; use limosa_proto::time::Instant; use limosa_proto::state::*;
pub struct Destination;
impl Destination { pub fn new(_: Instant, _: DestinationConfig) -> Destination { Destination }
 pub fn handle(&mut self, _: Instant, _: DestinationEvent) {} pub fn poll(&mut self)->Option<DestinationAction>{None} pub fn timeout(&self)->Option<Instant>{None} pub fn state(&self)->DestinationState{DestinationState::Done} }
