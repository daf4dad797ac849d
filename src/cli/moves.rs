//! `seed`, `migrate`, `push`, `pull`, `watch`, `cancel`: what moves VMs and images.
//!
//! Invariant: the job is the agent's. Leaving this command, by Ctrl-C or a lost terminal, never ends
//! it, unless `--attached` was given and Ctrl-C was pressed.

use super::args::DEFAULT_POOL;
use super::args::{Global, MigrateArgs, MoveArgs, Place, PullArgs, PushArgs, SeedArgs};
use super::progress::Display;
use super::{CommandError, Exit, ask_and_say, print, print_json, report, socket};
use crate::control::{
    self, Answer, Call, Event, Failure, FetchRequest, ImageName, MoveRequest, PullRequest,
    PushRequest, Reply, Request, Response,
};

pub(super) async fn seed(global: &Global, args: SeedArgs) -> Result<Exit, CommandError> {
    let SeedArgs { vm, to, background, how, .. } = args;
    let Some(to) = to else {
        return ask_and_say(global, &Request::SeedForget { vm }).await;
    };
    let wish = Request::Seed(MoveRequest { background, ..request(&vm, to, &how, None) });
    follow(global, &wish, Watched { vm, attached: how.attached }).await
}

pub(super) async fn migrate(global: &Global, args: MigrateArgs) -> Result<Exit, CommandError> {
    let MigrateArgs { vm, to, downtime_limit, window, best_time, how } = args;
    let limit_ms = downtime_limit.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    let wish = MoveRequest { windows: window, best_time, ..request(&vm, to, &how, limit_ms) };
    let waits = wish.windows.is_some() || best_time;
    let wish = Request::Migrate(wish);
    if waits {
        return ask_and_say(global, &wish).await;
    }
    follow(global, &wish, Watched { vm, attached: how.attached }).await
}

pub(super) async fn push(global: &Global, args: PushArgs) -> Result<Exit, CommandError> {
    let PushArgs { image, to: Place { peer, image: name }, replace, background, how } = args;
    let ImageName { pool, file } = name;
    let image = std::path::absolute(&image).unwrap_or(image);
    let Some(image) = image.to_str().map(str::to_owned) else {
        return Err(
            Failure::refused("the image's path is not UTF-8", "give it another name").into()
        );
    };
    let wish = Request::Push(PushRequest {
        image: image.clone(),
        to: peer,
        pool,
        file,
        replace,
        deadline_s: how.deadline.map(|deadline| deadline.as_secs().max(1)),
        rate: how.rate.clone(),
        background,
        detach: how.detach,
    });
    follow(global, &wish, Watched { vm: image, attached: how.attached }).await
}

pub(super) async fn pull(global: &Global, args: PullArgs) -> Result<Exit, CommandError> {
    let PullArgs { image: Place { peer, image }, to, replace, background, how } = args;
    let to =
        to.unwrap_or_else(|| ImageName { pool: DEFAULT_POOL.to_owned(), file: image.file.clone() });
    let vm = format!("{peer}:{image}");
    let wish = Request::Pull(PullRequest {
        from: peer,
        fetch: FetchRequest { image, to, replace, rate: how.rate.clone(), background },
        deadline_s: how.deadline.map(|deadline| deadline.as_secs().max(1)),
        detach: how.detach,
    });
    follow(global, &wish, Watched { vm, attached: how.attached }).await
}

pub(super) async fn watch(global: &Global, vm: String) -> Result<Exit, CommandError> {
    let request = Request::Watch { vm: vm.clone() };
    follow(global, &request, Watched { vm, attached: false }).await
}

pub(super) async fn cancel(global: &Global, vm: String) -> Result<Exit, CommandError> {
    ask_and_say(global, &Request::Cancel { vm }).await
}

fn request(vm: &str, to: String, how: &MoveArgs, downtime_limit_ms: Option<u64>) -> MoveRequest {
    MoveRequest {
        vm: vm.to_owned(),
        to,
        downtime_limit_ms,
        // A deadline of less than a second would be none.
        deadline_s: how.deadline.map(|deadline| deadline.as_secs().max(1)),
        rate: how.rate.clone(),
        background: false,
        detach: how.detach,
        windows: None,
        best_time: false,
    }
}

/// What Ctrl-C means.
struct Watched {
    vm: String,
    attached: bool,
}

/// Shows a job until it ends.
async fn follow(
    global: &Global,
    request: &Request,
    watched: Watched,
) -> Result<Exit, CommandError> {
    let mut call = control::call(&socket(global)?, request).await?;
    let mut display = Display::new(global.json);
    let mut admitted = false;
    let mut interrupted = false;
    loop {
        let Some(answer) = next_or_interrupt(&mut call, &mut interrupted).await? else {
            // Before the agent has admitted the job there is nothing that could go on.
            if !watched.attached || !admitted {
                display.finish();
                let vm = &watched.vm;
                eprintln!(
                    "The job goes on in the agent: `longhaul watch {vm}` follows it, \
                     `longhaul cancel {vm}` stops it."
                );
                return Ok(Exit::StoppedWatching);
            }
            display.show(&Event::Note("cancelling".to_owned()));
            let cancel = Request::Cancel { vm: watched.vm.clone() };
            // Its answer comes when the job has ended; that is seen here just as well.
            tokio::spawn({
                let socket = socket(global)?;
                async move {
                    if let Ok(mut call) = control::call(&socket, &cancel).await {
                        let _ = call.next().await;
                    }
                }
            });
            continue;
        };
        match answer {
            Answer::Event(event) => {
                admitted |= matches!(event, Event::Admitted(_));
                display.show(&event);
            }
            Answer::Response(response) => {
                display.finish();
                return end(global, response);
            }
        }
    }
}

/// The next answer, or nothing if Ctrl-C was pressed first; the second press is left to the system.
async fn next_or_interrupt(
    call: &mut Call,
    interrupted: &mut bool,
) -> Result<Option<Answer>, CommandError> {
    tokio::select! {
        answer = call.next() => Ok(Some(answer?)),
        _ = tokio::signal::ctrl_c(), if !*interrupted => {
            *interrupted = true;
            Ok(None)
        }
    }
}

fn end(global: &Global, response: Response) -> Result<Exit, CommandError> {
    match response {
        Response::Failed(failure) => Err(failure.into()),
        Response::Done(Reply::Completed(completed)) if global.json => {
            print_json(&serde_json::json!({ "completed": completed }));
            Ok(Exit::Done)
        }
        Response::Done(Reply::Completed(completed)) => {
            print!("{}", report::render(&completed));
            Ok(Exit::Done)
        }
        Response::Done(Reply::Started(job)) => {
            print(global, &serde_json::json!({ "started": job }), |_| {
                let (id, kind, vm, peer) = (job.id, job.kind, &job.vm, &job.peer);
                let toward = kind.preposition();
                format!("job {id}: {kind} {vm} {toward} {peer}; `longhaul watch {vm}` follows it\n")
            });
            Ok(Exit::Done)
        }
        Response::Done(_) => Err(CommandError::Mismatch),
    }
}
