//! The in-process link under test: UNIX socket pairs, no encryption, the peer known without asking.

use crate::subject::{NotApplicable, Subject, Wire};
use crate::toy::{Sender, Toy, ToySettings};
use crate::wire::{Carrier, StreamWire};
use limosa_link::Link;
use limosa_link::pair::PairLink;
use std::sync::Arc;
use tokio::runtime::Handle;

pub struct Pair {
    toy: Toy,
}

impl Pair {
    fn pair(&self, sender: &Sender) -> PairLink {
        PairLink::new(self.toy.sessions.clone(), sender.key.id(), self.toy.key.id())
    }
}

impl Subject for Pair {
    const NAME: &'static str = "pair";
    const ENCRYPTED: bool = false;
    const CONTROL_ENCRYPTED: bool = false;
    const LANES_KNOW_PEER: bool = true;
    const UNDER_WAY_MAX: Result<u64, NotApplicable> = Ok(1 << 20);

    async fn start(settings: ToySettings) -> Self {
        Pair { toy: Toy::start(settings).await }
    }

    fn toy(&self) -> &Toy {
        &self.toy
    }

    fn link(&self, sender: &Sender) -> Arc<dyn Link> {
        Arc::new(self.pair(sender))
    }

    async fn wire(&self, sender: &Sender) -> Arc<dyn Wire> {
        let (carrier, runtime) = (Carrier::new(), Handle::current());
        let between = carrier.clone();
        let link = Arc::new(self.pair(sender).with_streams(move || between.make_pair(&runtime)));
        Arc::new(StreamWire { link, carrier, accepting: None })
    }
}
