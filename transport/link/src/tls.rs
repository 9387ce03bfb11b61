//! Who may talk to us: the trusted set, and the TLS 1.3 handshake with raw public keys (RFC 7250).
//! The handshake is rustls's; what follows it on the wire is in `secure.rs`. No certificate, no name, no resumption, no 0-RTT.

use crate::key::{HostKey, SPKI_PREFIX};
use crate::refusals::Why;
use crate::secure::{Opener, RecordError, Rekey, Sealer};
pub use crate::trust::{Distrust, TrustedHosts};
use limosa_proto::identity::HostId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, UnbufferedClientConnection};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Most bytes taken from a peer whose key is not known yet. A whole handshake has less than 2 KiB; buffers that double and rustls's
/// own copy make at most 64 KiB of it.
pub(crate) const UNAUTHENTICATED_BYTES_MAX: usize = 16 << 10;

/// Why two hosts could not agree on who they are.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The destination's key is not in our trusted set.
    #[error("destination's key {0} is not trusted here: `limosa host trust {0}`")]
    DestinationUntrusted(HostId),
    /// The destination has another key than the one asked for.
    #[error("the host that answered has the key {found}, not the expected {expected}; it is another host, or it has a new key")]
    DestinationOther {
        /// Whom we asked for.
        expected: HostId,
        /// Who answered.
        found: HostId,
    },
    /// The source's key is not in our trusted set.
    #[error("source's key {0} is not trusted here: `limosa host trust {0}`")]
    SourceUntrusted(HostId),
    /// The peer's key is revoked here.
    #[error("the key {0} is revoked here, for good: whoever has it is not let in (`limosa host revoked` shows which are)")]
    Revoked(HostId),
    /// The peer's key was trusted here for a time.
    #[error("the key {0} was trusted here for a time that is over: the host has another one by now, or needs a new statement")]
    Expired(HostId),
    /// The peer's certificate is no Ed25519 key.
    #[error("the peer showed no Ed25519 host key")]
    NoHostKey,
    /// The peer ended the handshake or the connection with this TLS alert.
    #[error("the peer ended the connection with TLS alert {0}")]
    Alert(u8),
    /// The peer closed the connection before its first byte.
    #[error("the peer closed the connection before it said a word")]
    Silent,
    /// The peer closed the connection in the middle of the handshake.
    #[error("the peer closed the connection in the middle of the TLS handshake")]
    Closed,
    /// More bytes than anybody needs for a handshake.
    #[error("the peer sent more than {UNAUTHENTICATED_BYTES_MAX} bytes before its key was known")]
    TooLong,
    /// Any other failure of TLS.
    #[error("TLS failed: {0}")]
    Tls(#[from] rustls::Error),
    /// No keys for the records.
    #[error("TLS failed: {0}")]
    Record(#[from] RecordError),
    /// The socket failed.
    #[error("the connection failed during the TLS handshake: {0}")]
    Io(#[from] io::Error),
}

impl TlsError {
    /// Whether the peer's key is the reason, and not what it sent.
    pub(crate) fn is_of_the_key(&self) -> bool {
        matches!(self.why(), Why::Key | Why::Revoked | Why::Expired)
    }

    /// Why the key of a peer that connected, or to whom we connected, is refused.
    pub(crate) fn of(trusted: &TrustedHosts, id: HostId, other: fn(HostId) -> TlsError) -> TlsError {
        match trusted.why_not(id) {
            Some(Distrust::Revoked) => TlsError::Revoked(id),
            Some(Distrust::Expired(_)) => TlsError::Expired(id),
            Some(Distrust::Unknown) | None => other(id),
        }
    }

    /// The reason under which it is counted.
    pub(crate) fn why(&self) -> Why {
        match self {
            TlsError::SourceUntrusted(_) | TlsError::DestinationUntrusted(_) | TlsError::NoHostKey => Why::Key,
            TlsError::Revoked(_) => Why::Revoked,
            TlsError::Expired(_) => Why::Expired,
            _ => Why::Handshake,
        }
    }
}

/// The alert `access_denied`: what the other side sends for a key that it does not trust.
pub(crate) const ALERT_ACCESS_DENIED: u8 = 49;

/// Accepts the trusted keys and no other, and remembers whom it sent away so that the error can name him.
#[derive(Debug)]
pub(crate) struct Verifier {
    /// Whose keys count: being in one of these is enough.
    trusted: Vec<TrustedHosts>,
    expected: Option<HostId>,
    schemes: WebPkiSupportedAlgorithms,
    seen: Mutex<Option<HostId>>,
}

impl Verifier {
    fn check(&self, key: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let bytes: Option<[u8; 32]> = key.strip_prefix(&SPKI_PREFIX).and_then(|rest| rest.try_into().ok());
        let Some(id) = bytes.map(HostId) else {
            return Err(CertificateError::BadEncoding.into());
        };
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        let other = |expected| !self.trusted.iter().any(|set| set.same_host(expected, id));
        if self.expected.is_some_and(other) || !self.trusted.iter().any(|set| set.contains(id)) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(())
    }

    /// The key that was shown last.
    pub(crate) fn seen(&self) -> Option<HostId> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(key.as_ref()), signed, &self.schemes)
    }
}

fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(key).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, key, signed)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(key).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, key, signed)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The algorithms, made once: a stranger's handshake should cost as little as it can.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(make_provider).clone()
}

fn make_provider() -> Arc<CryptoProvider> {
    use rustls::crypto::ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let mut provider = rustls::crypto::ring::default_provider();
    // AES-128 first: the fastest with AES instructions, and no weaker than the curve of the key exchange.
    provider.cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(provider)
}

fn verifier(provider: &CryptoProvider, trusted: &[&TrustedHosts], expected: Option<HostId>) -> Arc<Verifier> {
    let schemes = provider.signature_verification_algorithms;
    let trusted = trusted.iter().copied().cloned().collect();
    Arc::new(Verifier { trusted, expected, schemes, seen: Mutex::new(None) })
}

fn source_config(
    key: &HostKey,
    verifier: Arc<Verifier>,
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ClientConfig, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key.certified()?)));
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    Ok(config)
}

fn destination_config(
    key: &HostKey,
    verifier: Arc<Verifier>,
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key.certified()?)));
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The source's side of one handshake that another protocol (QUIC) carries, and who will have seen the destination's key.
pub(crate) fn config_for_destination(
    key: &HostKey,
    trusted: &TrustedHosts,
    expected: HostId,
) -> Result<(rustls::ClientConfig, Arc<Verifier>), TlsError> {
    let provider = provider();
    let verifier = verifier(&provider, &[trusted], Some(expected));
    Ok((source_config(key, verifier.clone(), provider)?, verifier))
}

/// The destination's side of one handshake that another protocol (QUIC) carries, and who will have seen the source's key.
pub(crate) fn config_for_source(
    key: &HostKey,
    trusted: &TrustedHosts,
) -> Result<(rustls::ServerConfig, Arc<Verifier>), TlsError> {
    let provider = provider();
    let verifier = verifier(&provider, &[trusted], None);
    Ok((destination_config(key, verifier.clone(), provider)?, verifier))
}

fn connection_to_destination(
    key: &HostKey,
    verifier: Arc<Verifier>,
    provider: Arc<CryptoProvider>,
) -> Result<UnbufferedClientConnection, TlsError> {
    let mut config = source_config(key, verifier, provider)?;
    config.enable_secret_extraction = true;
    let name = ServerName::try_from("limosa").map_err(|_| rustls::Error::General("server name".into()))?;
    Ok(UnbufferedClientConnection::new(Arc::new(config), name)?)
}

fn connection_to_source(
    key: &HostKey,
    verifier: Arc<Verifier>,
    provider: Arc<CryptoProvider>,
) -> Result<UnbufferedServerConnection, TlsError> {
    let mut config = destination_config(key, verifier, provider)?;
    config.enable_secret_extraction = true;
    Ok(UnbufferedServerConnection::new(Arc::new(config))?)
}

/// What a finished handshake leaves: who the peer is, both directions' record protection, bytes that came early.
pub(crate) struct Secured {
    pub(crate) peer: HostId,
    pub(crate) sealer: Sealer,
    pub(crate) opener: Opener,
    /// Bytes of records (still sealed) that arrived behind the handshake.
    pub(crate) early: Vec<u8>,
}

/// What a handshake wants next.
enum Step {
    Again,
    Transmit,
    More,
    Done,
}

/// The two rustls connection types have the same shape and no common trait.
macro_rules! step {
    ($name:ident, $connection:ty) => {
        /// One step over `incoming`; returns how many bytes of it are used up.
        fn $name(
            connection: &mut $connection,
            incoming: &mut [u8],
            outgoing: &mut Vec<u8>,
        ) -> (usize, Result<Step, rustls::Error>) {
            let UnbufferedStatus { discard, state } = connection.process_tls_records(incoming);
            let step = match state {
                Err(error) => return (discard, Err(error)),
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let from = outgoing.len();
                    outgoing.resize(from + 1024, 0);
                    let mut written = data.encode(outgoing.get_mut(from..).unwrap_or_default());
                    if let Err(EncodeError::InsufficientSize(size)) = &written {
                        outgoing.resize(from + size.required_size, 0);
                        written = data.encode(outgoing.get_mut(from..).unwrap_or_default());
                    }
                    let Ok(written) = written else {
                        return (discard, Err(rustls::Error::General("handshake record".into())));
                    };
                    outgoing.truncate(from + written);
                    Step::Again
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Step::Transmit
                }
                Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    return (discard, Err(rustls::Error::General("closed in the handshake".into())));
                }
                Ok(_) => Step::More,
            };
            // A destination may write before it has heard the source's proof; that is not done.
            let done = matches!(step, Step::Done) && !connection.is_handshaking();
            let step = if matches!(step, Step::Done) && !done { Step::More } else { step };
            (discard, Ok(step))
        }
    };
}
step!(step_to_destination, UnbufferedClientConnection);
step!(step_to_source, UnbufferedServerConnection);

/// Sends what the handshake has to say. A peer that closed before its first byte, or with an alert, shows at the next read.
async fn transmit<S: AsyncWrite + Unpin>(stream: &mut S, outgoing: &mut Vec<u8>, heard: usize) -> Result<(), TlsError> {
    let sent = async {
        stream.write_all(outgoing).await?;
        stream.flush().await
    };
    let result: io::Result<()> = sent.await;
    outgoing.clear();
    match result {
        Err(error) if heard == 0 && is_gone(&error) => Ok(()),
        other => Ok(other?),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Drives a handshake over `stream`. rustls is given one record more at a time, so that what follows the
/// handshake stays sealed and is left for our own record layer.
async fn drive<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    mut step: impl FnMut(&mut [u8], &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>),
) -> Result<Vec<u8>, TlsError> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    let (mut offered, mut heard) = (0_usize, 0_usize);
    loop {
        let (used, next) = step(incoming.get_mut(..offered).unwrap_or_default(), &mut outgoing);
        let used = used.min(incoming.len());
        incoming.drain(..used);
        offered = offered.saturating_sub(used);
        match next {
            Err(error) => {
                // rustls has queued the alert that tells the peer why; it comes first.
                if !matches!(error, rustls::Error::AlertReceived(_)) {
                    let _ = step(incoming.get_mut(..offered).unwrap_or_default(), &mut outgoing);
                }
                let _ = stream.write_all(&outgoing).await;
                let _ = stream.flush().await;
                return Err(error.into());
            }
            Ok(Step::Again) => {}
            Ok(Step::Transmit) => {
                transmit(stream, &mut outgoing, heard).await?;
            }
            Ok(Step::Done) => {
                transmit(stream, &mut outgoing, heard).await?;
                return Ok(incoming);
            }
            Ok(Step::More) => loop {
                if let Some(record) = crate::secure::record_bytes(incoming.get(offered..).unwrap_or_default()) {
                    offered += record;
                    break;
                }
                if heard > UNAUTHENTICATED_BYTES_MAX {
                    return Err(TlsError::TooLong);
                }
                let read = match stream.read_buf(&mut incoming).await {
                    Err(error) if is_gone(&error) && heard == 0 => return Err(TlsError::Silent),
                    other => other?,
                };
                if read == 0 {
                    return Err(if heard == 0 { TlsError::Silent } else { TlsError::Closed });
                }
                heard += read;
            },
        }
    }
}

/// The source's handshake: the destination must be `expected` and trusted.
pub(crate) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: &HostKey,
    trusted: &TrustedHosts,
    expected: HostId,
) -> Result<Secured, TlsError> {
    let provider = provider();
    let verifier = verifier(&provider, &[trusted], Some(expected));
    let mut connection = connection_to_destination(key, verifier.clone(), provider)?;
    let early =
        drive(stream, |incoming, outgoing| step_to_destination(&mut connection, incoming, outgoing)).await.map_err(|error| {
            let refused = matches!(&error, TlsError::Tls(rustls::Error::InvalidCertificate(_)));
            match verifier.seen() {
                Some(found) if refused && !trusted.same_host(found, expected) => TlsError::DestinationOther { expected, found },
                Some(found) if refused => TlsError::of(trusted, found, TlsError::DestinationUntrusted),
                _ => worded(error),
            }
        })?;
    let peer = verifier.seen().ok_or(TlsError::NoHostKey)?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    let rekey = Rekey::new(Box::new(kernel));
    Ok(Secured { peer, sealer: Sealer::new(secrets.tx, rekey.clone())?, opener: Opener::new(secrets.rx, rekey)?, early })
}

/// The destination's handshake: the key of who comes must be in one of the sets.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    key: &HostKey,
    trusted: &[&TrustedHosts],
) -> Result<Secured, TlsError> {
    let provider = provider();
    let verifier = verifier(&provider, trusted, None);
    let mut connection = connection_to_source(key, verifier.clone(), provider)?;
    let early =
        drive(stream, |incoming, outgoing| step_to_source(&mut connection, incoming, outgoing)).await.map_err(|error| {
            let refused = matches!(&error, TlsError::Tls(rustls::Error::InvalidCertificate(_)));
            match verifier.seen() {
                Some(found) if refused => {
                    let known = trusted.iter().find(|set| set.why_not(found) != Some(Distrust::Unknown)).or(trusted.first());
                    known.map_or(TlsError::SourceUntrusted(found), |set| TlsError::of(set, found, TlsError::SourceUntrusted))
                }
                _ => worded(error),
            }
        })?;
    let peer = verifier.seen().ok_or(TlsError::NoHostKey)?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    let rekey = Rekey::new(Box::new(kernel));
    Ok(Secured { peer, sealer: Sealer::new(secrets.tx, rekey.clone())?, opener: Opener::new(secrets.rx, rekey)?, early })
}

fn worded(error: TlsError) -> TlsError {
    match error {
        TlsError::Tls(rustls::Error::AlertReceived(alert)) => TlsError::Alert(alert.into()),
        TlsError::Tls(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => TlsError::NoHostKey,
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn meet(
        ours: &HostKey,
        theirs: &HostKey,
        here: &TrustedHosts,
        there: &TrustedHosts,
        expected: HostId,
    ) -> (Result<Secured, TlsError>, Result<Secured, TlsError>) {
        let (mut near, mut far) = tokio::io::duplex(16 << 10);
        tokio::join!(
            async {
                let met = connect(&mut near, ours, here, expected).await;
                drop(near);
                met
            },
            async {
                let met = accept(&mut far, theirs, &[there]).await;
                drop(far);
                met
            }
        )
    }

    #[tokio::test]
    async fn each_must_trust_the_other() {
        let (ours, theirs, third) = (HostKey::generate().unwrap(), HostKey::generate().unwrap(), HostKey::generate().unwrap());
        let (nobody, all) = (TrustedHosts::default(), TrustedHosts::new([ours.id(), theirs.id(), third.id()]));
        let (near, far) = meet(&ours, &theirs, &all, &all, theirs.id()).await;
        assert_eq!((near.unwrap().peer, far.unwrap().peer), (theirs.id(), ours.id()));
        let (near, far) = meet(&ours, &theirs, &nobody, &all, theirs.id()).await;
        assert!(matches!(near, Err(TlsError::DestinationUntrusted(id)) if id == theirs.id()));
        assert!(matches!(far, Err(TlsError::Alert(ALERT_ACCESS_DENIED))));
        let (near, _) = meet(&ours, &theirs, &all, &all, third.id()).await;
        assert!(
            matches!(near, Err(TlsError::DestinationOther { expected, found }) if expected == third.id() && found == theirs.id())
        );
        let (_, far) = meet(&ours, &theirs, &all, &nobody, theirs.id()).await;
        assert!(matches!(far, Err(TlsError::SourceUntrusted(id)) if id == ours.id()));
        assert!(all.remove(ours.id()) && !all.contains(ours.id()) && !all.remove(ours.id()) && all.insert(ours.id()));
    }

    #[tokio::test]
    async fn a_handshake_cut_anywhere_or_garbled_is_an_error_and_no_panic() {
        let (ours, theirs) = (HostKey::generate().unwrap(), HostKey::generate().unwrap());
        let all = TrustedHosts::new([ours.id(), theirs.id()]);
        // What a source says first.
        let (mut near, mut far) = tokio::io::duplex(16 << 10);
        let mut hello = Vec::new();
        let (connected, _) = tokio::join!(
            async {
                let _ = tokio::time::timeout(std::time::Duration::from_millis(50), connect(&mut near, &ours, &all, theirs.id()))
                    .await;
                drop(near);
            },
            far.read_to_end(&mut hello)
        );
        let () = connected;
        assert!(hello.len() > 100);
        for number in 0..hello.len() * 2 {
            let mut bytes = hello.clone();
            if number < hello.len() {
                bytes.truncate(number);
            } else if let Some(byte) = bytes.get_mut(number - hello.len()) {
                *byte ^= 0x55;
            }
            let (mut near, mut far) = tokio::io::duplex(64 << 10);
            near.write_all(&bytes).await.unwrap();
            near.shutdown().await.unwrap();
            assert!(accept(&mut far, &theirs, &[&all]).await.is_err());
        }
    }
}
