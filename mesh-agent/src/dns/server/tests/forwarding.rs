//! What becomes of a resolver's reply on its way to the client, and of the client when there is none.

use super::*;

/// The query as a reply of this code, and records behind its question.
fn coded(query: &[u8], code: u8, authority: &[u8]) -> Vec<u8> {
    let mut reply = query.to_vec();
    reply.truncate(12 + query[12..].iter().position(|octet| *octet == 0).unwrap() + 5);
    reply[2] |= 0x80;
    reply[3] = 0x80 | code;
    reply[9] = u8::from(!authority.is_empty());
    reply[11] = 0;
    reply.extend(authority);
    reply
}

/// The root's SOA with this TTL, as a resolver without a route to anywhere else has it.
fn root_soa(ttl: u32) -> Vec<u8> {
    let mut record = vec![0, 0, 6, 0, 1];
    record.extend(ttl.to_be_bytes());
    record.extend([0, 22, 0, 0]);
    record.extend([0, 0, 0, 9].repeat(5));
    record
}

/// A reply whose one TXT record makes it `length` long.
fn of_length(query: &[u8], length: usize) -> Vec<u8> {
    let mut reply = coded(query, 0, &[]);
    reply[7] = 1;
    reply.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60]);
    let data = length - reply.len() - 2;
    reply.extend(u16::try_from(data).unwrap().to_be_bytes());
    for start in (0..data).step_by(256) {
        let text = (data - start).min(256) - 1;
        reply.push(u8::try_from(text).unwrap());
        reply.extend(vec![b'x'; text]);
    }
    reply
}

#[tokio::test]
async fn a_resolver_that_is_down_does_not_end_the_search_for_a_mesh_name() {
    let silent = resolver(|_, _| vec![]);
    let failing = resolver(|query, _| vec![coded(query, 2, &[])]);
    let refusing = resolver(|query, _| vec![coded(query, 5, &[])]);
    let nobody = client().await.local_addr().unwrap();
    for (how, resolver) in
        [("silent", silent.addr), ("failing", failing.addr), ("refusing", refusing.addr), ("not there", nobody)]
    {
        let bed = bed(Originals::Fixed(resolver), &[], PATIENCE);
        let begun = Instant::now();
        for name in ["world.corp.test", "World.mesh.Corp.Test", "_http._tcp.world.corp.test"] {
            let asked = with_edns(query(7, name, AAAA), 1232);
            let reply = ask(bed.addr, &asked).await;
            assert_eq!((rcode(&reply), reply[2] & 4), (3, 0), "{how}: {name} is not there, but that is not our word");
            assert_eq!((answers(&reply), u16_at(&reply, 8), u16_at(&reply, 10)), (0, 0, 1), "nothing to be kept");
        }
        assert!(begun.elapsed() < PATIENCE / 2, "{how}: the client still waits");
        assert_eq!(rcode(&ask_tcp(bed.addr, &query(7, "world.corp.test", A)).await), 3);
        assert!(ask(bed.addr, &query(8, "world", A)).await.ends_with(&VIP), "{how}");
    }
    // Every other name is none of ours, and its failure is one.
    let bed = bed(Originals::Fixed(nobody), &[], PATIENCE);
    for name in ["nobody.corp.test", "corp.test", "world.example.com", "worldcorp.test"] {
        assert_eq!(rcode(&ask(bed.addr, &query(9, name, A)).await), 2, "{name}");
    }
}

#[tokio::test]
async fn another_resolver_of_the_list_may_know_a_name_with_a_search_domain() {
    let (silent, knowing) = (resolver(|_, _| vec![]), resolver(|query, _| vec![reply_to(query)]));
    let bed = bed(Originals::Fixed(silent.addr), &[silent.addr, knowing.addr], Duration::from_millis(600));
    let asked = query(9, "world.corp.test", A);
    assert_eq!(ask(bed.addr, &asked).await, reply_to(&asked));
    assert_eq!(ask_tcp(bed.addr, &asked).await, reply_to(&asked));
    let other = query(9, "nobody.corp.test", A);
    assert_eq!(rcode(&ask(bed.addr, &other).await), 2, "all other names are asked of whom the client asks");
}

#[tokio::test]
async fn one_that_is_silent_is_waited_for_once() {
    // Silent about names below `corp.test` with an `m`.
    let resolver = resolver(|query, _| match query[13] {
        b'm' => vec![],
        _ => vec![coded(query, 3, &[])],
    });
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let took = async |name| {
        let begun = Instant::now();
        assert_eq!(rcode(&ask(bed.addr, &query(7, name, A)).await), 3, "{name}");
        begun.elapsed()
    };
    assert!(took("many.corp.test").await >= SEARCH_PATIENCE);
    for _ in 0..3 {
        assert!(took("many.corp.test").await < SEARCH_PATIENCE);
    }
    assert!(took("world.corp.test").await < SEARCH_PATIENCE, "it lives after all");
    assert!(took("many.corp.test").await >= SEARCH_PATIENCE);
}

#[tokio::test]
async fn a_resolver_that_answers_has_the_word_on_names_with_a_search_domain() {
    let resolver = resolver(|query, _| match query[13] {
        b'w' => vec![reply_to(query)],
        _ => vec![coded(query, 3, &root_soa(86_400))],
    });
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    let there = query(7, "world.corp.test", A);
    assert_eq!(ask(bed.addr, &there).await, reply_to(&there));
    let missing = query(7, "many.corp.test", A);
    assert_eq!(ask(bed.addr, &missing).await, coded(&missing, 3, &root_soa(86_400)));
}

#[tokio::test]
async fn nobody_may_remember_for_long_that_a_service_is_not_there() {
    let resolver = resolver(|query, _| vec![coded(query, 3, &root_soa(86_400))]);
    let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
    for name in ["later", "LATER.service.consul", "v2.later.service.consul"] {
        let asked = query(7, name, A);
        assert_eq!(ask(bed.addr, &asked).await, coded(&asked, 3, &root_soa(5)), "{name}");
        assert_eq!(ask_tcp(bed.addr, &asked).await, coded(&asked, 3, &root_soa(5)), "{name} over TCP");
    }
    for name in ["example.com", "service.consul", "localhost"] {
        let asked = query(7, name, A);
        assert_eq!(ask(bed.addr, &asked).await, coded(&asked, 3, &root_soa(86_400)), "{name}");
    }
}

#[tokio::test]
async fn what_a_denial_says_is_lowered_only_where_it_is_sound() {
    let asked = query(7, "later", A);
    let low = coded(&asked, 3, &root_soa(2));
    let mut cut = coded(&asked, 3, &root_soa(86_400));
    cut.truncate(cut.len() - 1);
    let mut many = coded(&asked, 3, &root_soa(86_400));
    (many[6], many[8]) = (0xff, 0xff);
    for reply in [low, cut, many, asked.clone(), vec![0; 12], vec![]] {
        let mut now = reply.clone();
        wire::forget_soon(&mut now, Duration::from_secs(5));
        assert_eq!(now, reply);
    }
}

#[tokio::test]
async fn no_client_gets_more_than_it_takes() {
    for (length, plain, with_1232, with_4096) in [
        (512, true, true, true),
        (513, false, true, true),
        (1232, false, true, true),
        (4096, false, false, true),
        (9000, false, false, false),
    ] {
        let resolver = resolver(move |query, _| vec![of_length(query, length)]);
        let bed = bed(Originals::Fixed(resolver.addr), &[], PATIENCE);
        let asked = query(7, "example.com", TXT);
        let whole = of_length(&asked, length);
        assert_eq!(whole.len(), length);
        for (asked, fits) in [
            (asked.clone(), plain),
            (with_edns(asked.clone(), 100), plain),
            (with_edns(asked.clone(), 1232), with_1232),
            (with_edns(asked.clone(), 4096), with_4096),
        ] {
            let reply = ask(bed.addr, &asked).await;
            assert_eq!(reply == whole, fits, "{length}: {}", reply.len());
            if !fits {
                assert!(is_truncated(&reply) && reply.len() <= 512 && answers(&reply) == 0 && rcode(&reply) == 0);
                assert_eq!(u16_at(&reply, 0), 7);
            }
            assert_eq!(ask_tcp(bed.addr, &asked).await, whole, "{length} over TCP");
        }
    }
}

#[tokio::test]
async fn copies_of_a_question_go_to_all_resolvers_of_the_list() {
    let nobody = client().await.local_addr().unwrap();
    let resolver = resolver(|query, _| vec![reply_to(query)]);
    let list = [resolver.addr, nobody];
    // The hook knows only whom the socket asked last.
    let bed = bed(Originals::Fixed(nobody), &list, PATIENCE);
    let socket = client().await;
    let asked = query(7, "example.com", TXT);
    for _ in list {
        socket.send_to(&asked, bed.addr).await.unwrap();
    }
    let replies = [receive(&socket).await, receive(&socket).await];
    assert!(replies.contains(&reply_to(&asked)), "one of them lives: {replies:?}");
    assert_eq!(resolver.heard.lock().unwrap().len(), 1, "and has heard it once");
    // One alone means whom it was sent to, and so do two questions.
    let other = query(8, "example.com", TXT);
    for asked in [&other, &query(9, "example.com", TXT)] {
        socket.send_to(asked, bed.addr).await.unwrap();
        assert_eq!(rcode(&receive(&socket).await), 2);
    }
    assert_eq!(rcode(&ask(bed.addr, &asked).await), 2, "another client");
    // Who is not in the list is asked alone.
    let stranger = client().await.local_addr().unwrap();
    let bed = super::bed(Originals::Fixed(stranger), &list, PATIENCE);
    for _ in 0..3 {
        socket.send_to(&asked, bed.addr).await.unwrap();
    }
    for _ in 0..3 {
        assert_eq!(rcode(&receive(&socket).await), 2);
    }
}
